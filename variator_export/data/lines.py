"""Lines of UTF-8 text; errors name the unreadable line."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from variator_export.core.errors import UserError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without line ends (LF or CRLF) and without a byte order mark.

    Raises:
        UserError: The file cannot be read, is empty, or has a line that is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"The data file {path} cannot be read: {error.strerror}.", "Check the path and its permissions."
        ) from error
    return split_lines(content, str(path))


def split_lines(content: bytes, name: str) -> list[str]:
    """The lines of UTF-8 text, as `read_lines` returns those of a file.

    Args:
        content: The text. Only LF and CRLF end a line: a text may hold other separators, such as U+2028.
        name: What the text was read from, for messages.

    Raises:
        UserError: The text is empty, or has a line that is not UTF-8.
    """
    if not content.removeprefix(_BYTE_ORDER_MARK).strip():
        raise UserError(f"{name} is empty.", "Provide a file with text.")
    return list(decode_lines(content.removesuffix(b"\n").split(b"\n"), name))


def decode_lines(raw_lines: Iterable[bytes], name: str) -> Iterator[str]:
    """The text of lines, one after the other, without line ends and without a byte order mark.

    Raises:
        UserError: A line is not UTF-8, or holds a NUL character.
    """
    for number, raw in enumerate(raw_lines, start=1):
        raw = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
        try:
            line = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}, line {number} is not UTF-8: byte {error.object[error.start]:#04x} at column "
                f"{error.start + 1}.",
                "Convert the file, for example: iconv -f WINDOWS-1252 -t UTF-8 FILE > converted.txt",
            ) from error
        if "\0" in line:
            raise UserError(
                f"{name}, line {number} contains a NUL character: this is not a text file.",
                "Provide a text file.",
            )
        yield line
