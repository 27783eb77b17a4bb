"""Pydantic's errors in words: where, what was found, what was expected, and the nearest known key."""

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError


def nearest(word: str, known: list[str]) -> str | None:
    """The known word that is most like the given one, or None if none is."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return matches[0] if matches else None


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that are known beside the last one of a location."""
    current: Any = model
    for step in location[:-1]:
        if isinstance(step, int) or not (isinstance(current, type) and issubclass(current, BaseModel)):
            continue
        field = current.model_fields.get(step)
        if field is None:
            return []
        current = _model_in(field.annotation)
    return (
        sorted(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []
    )


def _model_in(annotation: Any) -> Any:
    """The pydantic model within an annotation such as `tuple[Model, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """One sentence for each thing that is wrong."""
    sentences = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "the whole"
        if item["type"] == "extra_forbidden":
            known = _known_keys(model, item["loc"])
            guess = nearest(str(item["loc"][-1]), known)
            choice = f"did you mean {guess!r}?" if guess else f"known keys: {', '.join(known)}."
            sentences.append(f"unknown key {where!r}; {choice}")
        elif item["type"] == "missing":
            sentences.append(f"{where!r} is missing.")
        else:
            message = item["msg"].removeprefix("Value error, ")
            sentences.append(f"{where!r} is {item['input']!r}: {message[0].lower()}{message[1:]}.")
    return " ".join(sentences)
