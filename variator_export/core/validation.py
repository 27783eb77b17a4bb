"""Readable pydantic errors: the place, the value found, the expected value and the nearest known key."""

import dataclasses
from typing import Any

from pydantic import BaseModel, ValidationError

from variator_export.core.nearest import nearest


def _known_keys(model: type, location: tuple[int | str, ...]) -> list[str]:
    """The known keys at the level of a location's last key."""
    current: Any = model
    for step in location[:-1]:
        fields = _fields(current)
        if isinstance(step, int) or not fields:
            continue
        if step not in fields:
            return []
        current = _model_in(fields[step])
    return sorted(_fields(current))


def _fields(model: Any) -> dict[str, Any]:
    """The types of a model's fields by name; empty for anything else."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    if isinstance(model, type) and dataclasses.is_dataclass(model):
        return {field.name: field.type for field in dataclasses.fields(model)}
    return {}


def _model_in(annotation: Any) -> Any:
    """The model within an annotation such as `tuple[Model, ...] | None`."""
    if _fields(annotation):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def describe_validation_error(error: ValidationError, model: type) -> str:
    """One sentence per validation error.

    Args:
        error: The error raised by pydantic.
        model: The validated type, a pydantic model or a dataclass.
    """
    sentences = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "the whole"
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # the second for dataclasses
            known = _known_keys(model, item["loc"])
            guess = nearest(str(item["loc"][-1]), known)
            choice = f"did you mean {guess!r}?" if guess else f"known keys: {', '.join(known)}."
            sentences.append(f"unknown key {where!r}; {choice}")
        elif item["type"] == "missing":
            sentences.append(f"{where!r} is missing.")
        else:
            message = item["msg"].removeprefix("Value error, ")
            # An error of the whole model has no location; its message names the place.
            place = f"{where!r} is {item['input']!r}: " if item["loc"] else ""
            sentences.append(f"{place}{message[0].lower()}{message[1:]}.")
    return " ".join(sentences)
