"""Reading labelled examples from TSV, CSV, JSONL and CoNLL files, and from data sets by name."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_file, sha256_json
from variator_export.core.nearest import nearest
from variator_export.data.examples import Columns, Examples, Target
from variator_export.data.hub_dataset import is_dataset, read_dataset
from variator_export.data.json_lines import json_rows
from variator_export.data.lines import read_lines


def read_examples(source: str | Path, columns: Columns) -> Examples:
    """Read labelled examples.

    Tab-separated files are read without quoting: a quotation mark is an ordinary character.

    Args:
        source: A file (`.tsv`, `.csv`, `.jsonl`, `.conll`) or `datasets:NAME[,CONFIG],SPLIT`. A CoNLL file
            has one word on a line, with its tag last, and an empty line after each sentence; its columns are
            called `text` and `label`.
        columns: The columns to read.

    Raises:
        UserError: The source cannot be read, or a column or a value is missing. The message names the file
            and the line.
    """
    source = str(source)
    if not columns.header and (is_dataset(source) or source.endswith(".jsonl")):
        raise UserError(f"{source} is not a table: its columns have names.", "Leave out --no-header.")
    if is_dataset(source):
        wanted = [c for c in (columns.text, columns.pair, columns.target) if c]
        read = read_dataset(source, wanted, "--text-column, --pair-column or --label-column")
        rows: Iterator[tuple[str, Mapping[str, Any]]] = (
            (f"{source}, row {number}", row) for number, row in enumerate(read, start=1)
        )
        digest = sha256_json([[str(row[c]) for c in wanted] for row in read])
        return _collect(source, digest, rows, columns)
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"There is no data file {path}.", f"Give a file ({', '.join(SUFFIXES)}) or datasets:NAME."
        )
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} has the suffix {path.suffix or '(none)'}; labelled data is read from "
            f"{', '.join(SUFFIXES)} files.",
            "Rename or convert the file.",
        )
    rows = _READERS[path.suffix](path, read_lines(path), columns)
    return _collect(path.name, sha256_file(path), rows, columns)


def _collect(
    name: str, sha256: str, rows: Iterator[tuple[str, Mapping[str, Any]]], columns: Columns
) -> Examples:
    texts, pairs, targets, places = [], [], [], []
    for place, row in rows:
        places.append(place)
        texts.append(_text(place, columns.text, row.get(columns.text)))
        if columns.pair:
            pairs.append(_text(place, columns.pair, row.get(columns.pair)))
        if columns.target:
            targets.append(_target(place, columns.target, row.get(columns.target)))
    if not places:
        raise UserError(f"{name} has a header and no rows.", "Provide a file with rows.")
    return Examples(
        name,
        sha256,
        columns,
        tuple(texts),
        tuple(pairs) if columns.pair else None,
        tuple(targets) if columns.target else None,
        tuple(places),
    )


def _text(place: str, column: str, value: Any) -> str:
    """A text. A list of words becomes a text with a space between words."""
    if not isinstance(value, list | tuple):
        return _single(place, column, value)
    for word in value:
        if not isinstance(word, str) or not word or " " in word:
            raise UserError(
                f"{place}: the column {column!r} is not a list of words: it holds {word!r}.",
                "Correct it, or remove the line.",
            )
    return _single(place, column, " ".join(value))


def _target(place: str, column: str, value: Any) -> Target:
    """A label, a score, a list of labels, or the answers of SQuAD, which stand under `text`."""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    if isinstance(value, list | tuple):
        return tuple(_single(place, column, item) for item in value)
    return _single(place, column, value)


def _single(place: str, column: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip():
        raise UserError(f"{place}: the column {column!r} is empty.", "Fill it in, or remove the line.")
    if isinstance(value, dict | list | tuple):
        raise UserError(
            f"{place}: the column {column!r} does not hold a single value.", "Choose another column."
        )
    return str(value)


def table_rows(
    path: Path, lines: Iterable[str], columns: Mapping[str, str | None], *, header: bool
) -> Iterator[tuple[str, dict[str, str]]]:
    """The place and the fields of each row of a .tsv or .csv file.

    Args:
        path: The file; its suffix decides whether quotation marks quote.
        lines: The lines of the file.
        columns: The columns that must be there, by the option that names them.
        header: Whether the first line names the columns. Otherwise their names are their numbers from 1.

    Raises:
        UserError: A column is missing, or a line is broken. The message names the line.
    """
    is_tsv = path.suffix == ".tsv"
    text = (line + "\n" for line in lines)
    if is_tsv:
        reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(text, strict=True)
    names: list[str] | None = None
    last = 0
    csv.field_size_limit(1 << 30)
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: {error}.",
                "Correct the quotation marks or the stray carriage return there.",
            ) from error
        if fields is None:
            return
        place, last = f"{path}, line {last + 1}", reader.line_num
        if not fields or not any(field.strip() for field in fields):
            raise UserError(f"{place} is empty.", "Remove the line.")
        if names is None:
            names = fields if header else [str(number) for number in range(1, len(fields) + 1)]
            if len(set(names)) < len(names):
                repeated = Counter(names).most_common(1)[0][0]
                raise UserError(
                    f"{path} has the column {repeated!r} twice.", "Rename one of them in the first line."
                )
            check_columns(str(path), columns, tuple(names), header=header)
            if header:
                continue
        if len(fields) != len(names):
            raise UserError(
                f"{place} has {len(fields)} columns; the first line has {len(names)}.",
                "Correct the line: a text may contain a separator"
                + (" or a line break." if is_tsv else "; put such texts in quotation marks."),
            )
        yield place, dict(zip(names, fields, strict=True))


def _table_rows(
    path: Path, lines: Sequence[str], columns: Columns
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return table_rows(path, lines, columns.by_option, header=columns.header)


def _json_rows(path: Path, lines: Sequence[str], columns: Columns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, row in json_rows(path, lines):
        check_columns(place, columns.by_option, tuple(row))
        yield place, row


def _conll_rows(
    path: Path, lines: Sequence[str], columns: Columns
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    check_columns(str(path), columns.by_option, ("text", "label"), header=columns.header)
    sentence: list[list[str]] = []
    start = 1
    for number, line in enumerate([*lines, ""], start=1):
        fields = line.split()
        if fields and len(fields) < 2:
            raise UserError(f"{path}, line {number} has a word and no tag.", "Write the tag after the word.")
        if fields and fields[0] != "-DOCSTART-":
            start = start if sentence else number
            sentence.append(fields)
        elif sentence:
            words, tags = [row[0] for row in sentence], [row[-1] for row in sentence]
            yield f"{path}, line {start}", {"text": words, "label": tags}
            sentence = []


_READERS = {".tsv": _table_rows, ".csv": _table_rows, ".jsonl": _json_rows, ".conll": _conll_rows}
SUFFIXES = tuple(_READERS)


def check_columns(
    where: str, columns: Mapping[str, str | None], there: tuple[str, ...], *, header: bool = True
) -> None:
    """Check that columns exist.

    Args:
        where: The file or the line, for the message.
        columns: The columns by the option that names them; None for one that is not wanted.
        there: The names of the columns that exist.
        header: Whether a table's first line names its columns.

    Raises:
        UserError: A column is missing.
    """
    for option, column in columns.items():
        if column is not None and column not in there:
            guess = nearest(column, list(there))
            hint = f"{option} {guess!r}" if guess else f"Name the right one with {option}"
            if header and not guess:
                hint += "; a table without a header needs --no-header, and columns by number from 1"
            listed = ", ".join(repr(name) for name in there[:12])
            raise UserError(f"{where} has no column {column!r}; it has {listed}.", f"{hint}.")
