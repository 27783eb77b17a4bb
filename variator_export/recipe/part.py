"""What all parts of a recipe have in common."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from variator_export.core.nearest import nearest


class RecipePart(BaseModel):
    """Frozen; unknown keys are refused; a text behind a field is its description in the JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def known(name: str, names: Sequence[str]) -> str:
    """A name that a registry has.

    Raises:
        ValueError: It has none of that name.
    """
    if name not in names:
        guess = nearest(name, list(names))
        raise ValueError(f"known are {', '.join(names)}{f'; did you mean {guess!r}?' if guess else ''}")
    return name
