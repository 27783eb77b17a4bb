"""Shares, written as people write them."""


def parse_share(text: str) -> float:
    """Parse `1%` or `0.01`.

    Raises:
        ValueError: The text is not a share from 0 to 1.
    """
    stripped = text.strip()
    try:
        value = float(stripped.removesuffix("%")) / (100 if stripped.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ValueError(f"{text} is not a share from 0 to 1")
    return value
