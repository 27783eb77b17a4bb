"""Sizes in bytes that a person types: `150MB`."""

import re

from variator_export.core.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMG]?(?:I?B)?)\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """The number of bytes of `150MB`, `1.5 GiB` or `1000`.

    Raises:
        UserError: The text is not a size of at least one byte.
    """
    match = _SIZE.fullmatch(str(text))
    unit = match[2].upper() if match else None
    if match is None or unit not in _UNITS or (found := round(float(match[1]) * _UNITS[unit])) < 1:
        raise UserError(f"{text!r} is not a size.", "Give, for example, 150MB or 1.5GiB.")
    return found
