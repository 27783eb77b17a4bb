"""Base class and helpers for the parts of a recipe."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from variator_export.core.nearest import nearest


class RecipeModel(BaseModel):
    """Base of all recipe parts: frozen, refuses unknown keys, and describes each field by its docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def known(name: str, names: Sequence[str]) -> str:
    """Check that a registry has a name, and return the name.

    Raises:
        ValueError: The registry has no such name.
    """
    if name not in names:
        guess = nearest(name, list(names))
        raise ValueError(f"choose from {', '.join(names)}{f'; did you mean {guess!r}?' if guess else ''}")
    return name
