"""JSON Lines: one object per line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError


def json_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the object of each line.

    Raises:
        UserError: A line is empty, is not JSON, or is not an object.
    """
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        if not line.strip():
            raise UserError(f"{place} is empty.", "Remove the line.")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not JSON: {error}.", "Correct or remove the line.") from error
        if not isinstance(row, dict):
            raise UserError(f"{place} is not a JSON object.", 'Write one object per line: {"text": "..."}')
        yield place, row
