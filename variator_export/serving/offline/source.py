"""Texts from files of any length, read as a stream and cut into chunks."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from variator_export.core.environment import require
from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_json
from variator_export.data.example_files import check_columns, table_rows
from variator_export.data.json_lines import json_rows
from variator_export.data.lines import decode_lines

STANDARD_INPUT = "-"
SUFFIXES = (".txt", ".jsonl", ".tsv", ".csv", ".parquet")
# Rows of a Parquet file that are in memory at once.
_PARQUET_ROWS = 1024
_LARGEST_ID = 2**63 - 1

TextId = int | str
# The place of a text in the input, the text, and its id; None if no column holds ids.
_Row = tuple[str, str, TextId | None]


@dataclass(frozen=True)
class Chunk:
    """Texts that follow one another in the input.

    Attributes:
        index: The number of the chunk, from 0.
        first: The number of texts before the chunk.
        texts: The texts.
        ids: The id of each text: from the input, or else the number of the text, from 0.
        places: The place of each text in the input, for messages.
    """

    index: int
    first: int
    texts: list[str]
    ids: list[TextId]
    places: list[str]

    @functools.cached_property
    def sha256(self) -> str:
        """The sha256 of the texts and their ids."""
        return sha256_json([self.ids, self.texts])


class TextSource:
    """A file of texts, or lines on standard input.

    Args:
        name: A `.txt` file with a text on each line, a `.jsonl`, `.tsv`, `.csv` or `.parquet` file, or `-`
            for lines on standard input.
        text_column: The column of the text, in a table.
        id_column: The column of the id, in a table. None if there is none.
        header: Whether the first line of a `.tsv` or `.csv` file names its columns.

    Raises:
        UserError: The file is not there, or cannot be one of texts.
    """

    def __init__(
        self, name: str, text_column: str = "text", id_column: str | None = None, *, header: bool = True
    ) -> None:
        self.path = None if name == STANDARD_INPUT else Path(name)
        self.name = "Standard input" if self.path is None else name
        self._columns = {"--text-column": text_column, "--id-column": id_column}
        self._text_column, self._id_column, self._header = text_column, id_column, header
        suffix = ".txt" if self.path is None else self.path.suffix
        if suffix not in SUFFIXES:
            raise UserError(
                f"{name} has the suffix {suffix or '(none)'}; texts are read from {', '.join(SUFFIXES)}.",
                "Rename or convert the file, or give lines on standard input: --input -",
            )
        if suffix == ".txt" and id_column is not None:
            raise UserError(
                f"{self.name} is lines of text, without ids; --id-column {id_column!r} names a column.",
                "Leave it out: the id of a text is its number, from 0. Or give a table (.jsonl, .csv).",
            )
        if suffix == ".parquet":
            require("pyarrow", "parquet", "Reading Parquet")
        if self.path is not None and not self.path.is_file():
            raise UserError(f"There is no file {name}.", "Give the file with the texts: --input FILE")
        self._suffix = suffix
        # Progress through the file, in bytes, or in rows of a Parquet file.
        self._size = self.path.stat().st_size if self.path is not None else None
        self._read = 0
        self._texts = 0
        self._ended = False

    @property
    def has_ids(self) -> bool:
        """Whether a column of the input holds ids."""
        return self._id_column is not None

    @property
    def expected_texts(self) -> int | None:
        """The number of texts in the input: estimated until the end is read. None if it cannot be known."""
        if self._ended:
            return self._texts
        if not self._size or not self._read:
            return None
        return max(self._texts, round(self._texts * self._size / self._read))

    def chunks(self, size: int) -> Iterator[Chunk]:
        """The texts in chunks of `size`, in the order of the input.

        Raises:
            UserError: The input cannot be read, is empty, or has a line without a text. The message names the
                line.
        """
        index, rows = 0, self._checked_rows()
        while taken := list(itertools.islice(rows, size)):
            places, found, ids = map(list, zip(*taken, strict=True))
            first = self._texts
            self._texts += len(found)
            if len(found) < size:
                self._ended = True
            yield Chunk(index, first, found, _ids(ids, first), places)
            index += 1
        self._ended = True
        if not self._texts:
            raise UserError(f"{self.name} holds no text.", "Give a file with texts: --input FILE")

    def _checked_rows(self) -> Iterator[_Row]:
        kind: type | None = None
        for place, row in self._rows():
            text = _text(place, self._text_column, row.get(self._text_column))
            if self._id_column is None:
                yield place, text, None
                continue
            found = _id(place, self._id_column, row.get(self._id_column))
            kind = kind or type(found)
            if type(found) is not kind:
                raise UserError(
                    f"{place}: the id {found!r} is of type {type(found).__name__}, those before it of type "
                    f"{kind.__name__}.",
                    "Make all ids numbers, or all of them strings.",
                )
            yield place, text, found

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The place and the columns of each row."""
        try:
            if self._suffix == ".parquet":
                yield from self._parquet_rows()
                return
            with self._open() as file:
                lines = decode_lines(self._counted(file), self.name)
                if self._suffix == ".txt":
                    for number, line in enumerate(lines, start=1):
                        yield f"{self.name}, line {number}", {self._text_column: line}
                    return
                assert self.path is not None
                if self._suffix == ".jsonl":
                    for place, row in json_rows(self.path, lines):
                        check_columns(place, self._columns, tuple(row))
                        yield place, row
                else:
                    yield from table_rows(self.path, lines, self._columns, header=self._header)
        except OSError as error:
            raise UserError(
                f"{self.name} cannot be read: {(error.strerror or str(error)).lower()}.",
                "Check the path and its permissions.",
            ) from error

    def _open(self) -> BinaryIO:
        if self.path is not None:
            return self.path.open("rb")
        # A thread may wait in a read of it when the process ends, which sys.stdin does not survive.
        return open(0, "rb", closefd=False)

    def _counted(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        for line in lines:
            self._read += len(line)
            yield line

    def _parquet_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        import pyarrow
        import pyarrow.parquet

        assert self.path is not None
        try:
            file = pyarrow.parquet.ParquetFile(self.path)
            check_columns(self.name, self._columns, tuple(file.schema_arrow.names))
            self._size = file.metadata.num_rows
            columns = [column for column in self._columns.values() if column is not None]
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    self._read += 1
                    yield f"{self.name}, row {self._read}", row
        except pyarrow.ArrowInvalid as error:
            raise UserError(
                f"{self.name} is not a Parquet file: {error}.", "Write it again, or convert it to .jsonl."
            ) from error


def _ids(ids: list[TextId | None], first: int) -> list[TextId]:
    return [first + place if found is None else found for place, found in enumerate(ids)]


def _text(place: str, column: str, value: Any) -> str:
    if value is None:
        raise UserError(
            f"{place}: the column {column!r} is null, which is no text.", "Give a text, or remove the line."
        )
    if not isinstance(value, str):
        raise UserError(
            f"{place}: the column {column!r} holds {value!r}, of type {type(value).__name__}, not a text.",
            "Choose another column with --text-column, or correct the line.",
        )
    _check_unicode(place, value)
    return value


def _id(place: str, column: str, value: Any) -> TextId:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(
            f"{place}: the column {column!r} holds {value!r}; an id is a whole number or a string.",
            "Choose another column with --id-column, or correct the line.",
        )
    if isinstance(value, str):
        _check_unicode(place, value)
    elif not -_LARGEST_ID <= value <= _LARGEST_ID:
        raise UserError(f"{place}: the id {value} needs more than 64 bits.", "Write ids as strings.")
    return value


def _check_unicode(place: str, text: str) -> None:
    """Refuse half characters, which escapes in JSON may spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} is not valid Unicode: {error}.", "Correct or remove the line.") from error
