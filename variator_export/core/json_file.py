"""Reading JSON files that somebody else wrote, and writing our own."""

import json
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError


def read_json(path: Path, hint: str) -> Any:
    """The content of a JSON file.

    Args:
        path: The file.
        hint: What to do if it cannot be read.

    Raises:
        UserError: It is not there, may not be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", hint) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.", hint) from error


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        UserError: As `read_json`, or it holds something else.
    """
    content = read_json(path, hint)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object.", hint)
    return content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON document; makes the folder."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
