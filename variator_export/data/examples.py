"""Labelled examples from TSV, CSV and JSONL files, and from data sets by name."""

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_file, sha256_json
from variator_export.core.nearest import nearest
from variator_export.data.hub_dataset import is_dataset, read_dataset
from variator_export.data.json_lines import json_rows
from variator_export.data.lines import read_lines

SUFFIXES = (".tsv", ".csv", ".jsonl")


@dataclass(frozen=True)
class Columns:
    """The columns to read, by name, or by number from 1 for a table without a header.

    Attributes:
        text: The column of the text.
        pair: The column of the second text of a pair. None if there is none.
        target: The column of the class label or the score. None to read only text.
        header: Whether the first line of a table names the columns.
    """

    text: str = "text"
    pair: str | None = None
    target: str | None = "label"
    header: bool = True


@dataclass(frozen=True)
class Examples:
    """Texts with their labels or scores.

    Attributes:
        name: The file's name without its folder, or the data set as requested.
        sha256: Hash of the file, or of the rows read from the data set.
        columns: The columns that the examples were read from.
        texts: The text of each example.
        pairs: The second texts. None if there are none.
        targets: Class labels or scores, as written in the data. None if not requested.
        places: The place of each example in the data, for messages.
    """

    name: str
    sha256: str
    columns: Columns
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    targets: tuple[str, ...] | None
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def scores(self) -> list[float]:
        """The targets as numbers.

        Raises:
            UserError: A target is not a number, or all are equal, which leaves nothing to rank.
        """
        values = []
        for place, target in zip(self.places, self.targets or (), strict=True):
            try:
                value = float(target)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise UserError(
                    f"{place}: the score {target!r} is not a number.", "Correct or remove the line."
                )
            values.append(value)
        if len(set(values)) < 2:
            raise UserError(
                f"All {len(values)} scores of {self.name} are equal: no correlation can be computed.",
                "Choose another column, or provide more data.",
            )
        return values

    def classes(self) -> list[str]:
        """The class labels in the data: in numeric order if all are numbers, else in alphabetical order.

        Raises:
            UserError: The data has only one class.
        """
        assert self.targets is not None
        found = Counter(self.targets)
        if len(found) < 2:
            raise UserError(
                f"All {len(self)} examples of {self.name} have the label {next(iter(found))!r}: there is "
                "nothing to learn.",
                "Check the label column, and that the file was not cut from sorted data.",
            )
        is_number = all(label.removeprefix("-").isdecimal() for label in found)
        return sorted(found, key=int) if is_number else sorted(found)

    def class_indices(self, label2id: Mapping[str, int]) -> list[int]:
        """The class index of each example.

        Raises:
            UserError: The classifier does not have one of the labels.
        """
        indices = []
        for place, label in zip(self.places, self.targets or (), strict=True):
            if label not in label2id:
                raise UserError(
                    f"{place}: the label {label!r} is not one of the classifier's: {', '.join(label2id)}.",
                    "Correct it, or name the right column with --label-column.",
                )
            indices.append(int(label2id[label]))
        return indices

    def select(self, indices: Sequence[int]) -> "Examples":
        """Some of the examples, in the given order."""

        def pick(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if values is None else tuple(values[i] for i in indices)

        return Examples(
            self.name,
            self.sha256,
            self.columns,
            tuple(self.texts[i] for i in indices),
            pick(self.pairs),
            pick(self.targets),
            tuple(self.places[i] for i in indices),
        )


def read_examples(source: str, columns: Columns) -> Examples:
    """Read labelled examples.

    Tab-separated files are read without quoting: a quotation mark is an ordinary character.

    Args:
        source: A file (`.tsv`, `.csv`, `.jsonl`) or `datasets:NAME[,CONFIG],SPLIT`.
        columns: The columns to read.

    Raises:
        UserError: The source cannot be read, or a column or a value is missing. The message names the file
            and the line.
    """
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
    lines = read_lines(path)
    rows = _json_rows(path, lines, columns) if path.suffix == ".jsonl" else _table_rows(path, lines, columns)
    return _collect(path.name, sha256_file(path), rows, columns)


def _collect(
    name: str, sha256: str, rows: Iterator[tuple[str, Mapping[str, Any]]], columns: Columns
) -> Examples:
    kept: dict[str, list[str]] = {c: [] for c in (columns.text, columns.pair, columns.target) if c}
    places = []
    for place, row in rows:
        places.append(place)
        for column, values in kept.items():
            value = row.get(column)
            if value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip():
                raise UserError(
                    f"{place}: the column {column!r} is empty.", "Fill it in, or remove the line."
                )
            if isinstance(value, dict | list):
                raise UserError(
                    f"{place}: the column {column!r} does not hold a single value.", "Choose another column."
                )
            values.append(str(value))
    if not places:
        raise UserError(f"{name} has a header and no rows.", "Provide a file with rows.")

    def column_of(column: str | None) -> tuple[str, ...] | None:
        return tuple(kept[column]) if column else None

    texts = column_of(columns.text)
    assert texts is not None
    return Examples(
        name, sha256, columns, texts, column_of(columns.pair), column_of(columns.target), tuple(places)
    )


def _table_rows(
    path: Path, lines: Sequence[str], columns: Columns
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    is_tsv = path.suffix == ".tsv"
    text = (line + "\n" for line in lines)
    if is_tsv:
        reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(text, strict=True)
    header: list[str] | None = None
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
        if header is None:
            header = fields if columns.header else [str(number) for number in range(1, len(fields) + 1)]
            if len(set(header)) < len(header):
                repeated = Counter(header).most_common(1)[0][0]
                raise UserError(
                    f"{path} has the column {repeated!r} twice.", "Rename one of them in the first line."
                )
            _check_columns(str(path), columns, tuple(header))
            if columns.header:
                continue
        if len(fields) != len(header):
            raise UserError(
                f"{place} has {len(fields)} columns; the first line has {len(header)}.",
                "Correct the line: a text may contain a separator"
                + (" or a line break." if is_tsv else "; put such texts in quotation marks."),
            )
        yield place, dict(zip(header, fields, strict=True))


def _json_rows(path: Path, lines: Sequence[str], columns: Columns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, row in json_rows(path, lines):
        _check_columns(place, columns, tuple(row))
        yield place, row


def _check_columns(where: str, columns: Columns, there: tuple[str, ...]) -> None:
    for option, column in (
        ("--text-column", columns.text),
        ("--pair-column", columns.pair),
        ("--label-column", columns.target),
    ):
        if column is not None and column not in there:
            guess = nearest(column, list(there))
            hint = f"{option} {guess!r}" if guess else f"Name the right one with {option}"
            if columns.header and not guess:
                hint += "; a table without a header needs --no-header, and columns by number from 1"
            listed = ", ".join(repr(name) for name in there[:12])
            raise UserError(f"{where} has no column {column!r}; it has {listed}.", f"{hint}.")
