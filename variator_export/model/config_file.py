"""Reading the configurations of plugins and modules."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from variator_export.core.errors import UserError
from variator_export.core.json_file import read_json_object
from variator_export.core.validation import describe_validation_error

_FORMAT_VERSION = 1

Config = TypeVar("Config")


def read_config(path: Path, kind: type[Config], what: str, page: str) -> Config:
    """Read and check a configuration.

    Args:
        path: The file.
        kind: The class of the configuration.
        what: What the file is supposed to be, with its article.
        page: The page that lists all fields.

    Raises:
        UserError: The file is not JSON, or a field is unknown, missing or wrong.
    """
    content = read_json_object(path, "Restore the file from its source.")
    version = content.get("format_version")
    if isinstance(version, int) and version > _FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}; this version of variator-export reads {_FORMAT_VERSION}.",
            "Upgrade: pip install -U variator-export",
        )
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise UserError(
            f"{path} is not {what}: {describe_validation_error(error, kind)}",
            f"Correct the field named above; {page} lists all fields.",
        ) from error
