"""Reading JSON files from outside, and writing our own."""

import json
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError


def read_json(path: Path, hint: str) -> Any:
    """The content of a JSON file.

    Args:
        path: The file.
        hint: The hint for the user if the file cannot be read.

    Raises:
        UserError: The file is missing, may not be read, or is not JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        # Escapes may spell half a character, which no text holds and nothing can print.
        json.dumps(content, ensure_ascii=False).encode()
        return content
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", hint) from error
    except (ValueError, RecursionError) as error:  # JSON, UTF-8, and half characters
        raise UserError(f"{path} is not valid JSON: {error}.", hint) from error


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinity, which Python reads and JSON does not have."""
    raise ValueError(f"it holds {name}")


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        UserError: Same conditions as `read_json`, or the file holds another JSON value.
    """
    content = read_json(path, hint)
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object.", hint)
    return content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON document, and create its folder if needed."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file, and create its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
