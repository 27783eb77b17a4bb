"""Protocol buffer text format, the language of `config.pbtxt`, written without the protobuf package."""

from collections.abc import Mapping, Sequence

_INDENT = "  "


class Symbol(str):
    """The name of an enum value, which is written without quotes: `TYPE_INT64`."""


def write_message(fields: Mapping[str, object]) -> str:
    """The text of a message.

    Args:
        fields: Values by field name: a string, a number, a boolean, a `Symbol`, a mapping for a message, or
            a sequence of these for a repeated field.

    Returns:
        One line for each field, and for each element of a repeated message.
    """
    return "".join(f"{line}\n" for line in _lines(fields))


def map_entries(values: Mapping[str, object]) -> list[Mapping[str, object]]:
    """The elements of a map field."""
    return [{"key": key, "value": value} for key, value in values.items()]


def _lines(fields: Mapping[str, object]) -> list[str]:
    lines = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            lines += _message(name, value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            messages = [element for element in value if isinstance(element, Mapping)]
            if messages:
                lines += [line for message in messages for line in _message(name, message)]
            elif value:
                lines.append(f"{name}: [{', '.join(map(_scalar, value))}]")
        else:
            lines.append(f"{name}: {_scalar(value)}")
    return lines


def _message(name: str, fields: Mapping[str, object]) -> list[str]:
    return [f"{name} {{", *(_INDENT + line for line in _lines(fields)), "}"]


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not isinstance(value, Symbol):
        return _quoted(value)
    return str(value)


def _quoted(text: str) -> str:
    """A string literal. Everything but printable ASCII is written byte by byte, in octal."""
    characters = []
    for byte in text.encode():
        character = chr(byte)
        if character in '"\\':
            characters.append("\\" + character)
        else:
            characters.append(character if 32 <= byte < 127 else f"\\{byte:03o}")
    return f'"{"".join(characters)}"'
