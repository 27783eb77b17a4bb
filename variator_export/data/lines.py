"""Lines of UTF-8 text; errors name the unreadable line."""

from pathlib import Path

from variator_export.core.errors import UserError


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
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise UserError(f"{name} is empty.", "Provide a file with text.")
    lines = []
    for number, raw in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            line = raw.removesuffix(b"\r").decode("utf-8")
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
        lines.append(line)
    return lines
