"""Suggestions for a mistyped word."""

import difflib


def nearest(word: str, known: list[str]) -> str | None:
    """The known word that is most similar to the given one, or None if none is similar."""
    matches = difflib.get_close_matches(word.lower(), [name.lower() for name in known], n=1, cutoff=0.6)
    return next(name for name in known if name.lower() == matches[0]) if matches else None
