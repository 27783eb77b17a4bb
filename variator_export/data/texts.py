"""Plain text for pre-training: `.txt` and `.jsonl` files, folders of files, and data sets by name."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_file, sha256_json
from variator_export.data.hub_dataset import is_dataset, read_dataset
from variator_export.data.json_lines import json_rows
from variator_export.data.lines import read_lines

SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class TextSource:
    """The text of one file or data set.

    Attributes:
        name: The file's name without its folder, or the data set as requested.
        sha256: Hash of the file, or of the documents read from the data set.
        documents: Texts of any length; a passage never spans two documents.
        share: The share of passages that come from all texts of this group. None for the remaining share.
        group: Index of the given source that this text belongs to.
    """

    name: str
    sha256: str
    documents: tuple[str, ...]
    share: float | None = None
    group: int = 0

    @property
    def num_characters(self) -> int:
        """The length of all documents."""
        return sum(len(document) for document in self.documents)


def read_texts(sources: Sequence[str], text_field: str = "text") -> list[TextSource]:
    """Read texts in the given order; a folder's files are read in the order of their names.

    Args:
        sources: Files (`.txt`: one document; `.jsonl`: one document per line), folders, or `datasets:NAME`.
            Each may end in `@SHARE`, the share of all passages that come from the source, between 0 and 1.
            The remaining passages come from the sources without a share, by their number of sentences.
        text_field: The field of `.jsonl` lines and the column of data sets that holds the text.

    Raises:
        UserError: A source cannot be read, has no text, or is given twice. The message names the file and the
            line.
    """
    found: list[TextSource] = []
    shared = [_share(given) for given in sources]
    for group, (source, share) in enumerate(shared):
        if not source:
            raise UserError(
                "The name of a text source is empty.", "Give --text SRC: a file, a folder, or datasets:NAME."
            )
        if is_dataset(source):
            read = [_read_dataset(source, text_field)]
        else:
            read = [_read_file(path, text_field) for path in _files(Path(source))]
        found += [replace(text, share=share, group=group) for text in read]
    _check_shares([share for _, share in shared])
    seen: dict[str, str] = {}
    for text in found:
        if text.sha256 in seen:
            raise UserError(
                f"The text {text.name} was given twice, also as {seen[text.sha256]}: it would count twice.",
                "Give the text once.",
            )
        seen[text.sha256] = text.name
    return found


def _share(source: str) -> tuple[str, float | None]:
    """A source and its share. An existing file with an @ in its name is used as it is."""
    name, separator, text = source.rpartition("@")
    if not separator or Path(source).exists():
        return source, None
    try:
        share = float(text)
    except ValueError:
        return source, None
    if not 0 < share <= 1:
        raise UserError(f"The share of {source} is not between 0 and 1.", f"For example: --text {name}@0.5")
    return name, share


def _check_shares(shares: Sequence[float | None]) -> None:
    total = sum(share for share in shares if share is not None)
    whole = None not in shares
    if (whole and abs(total - 1) > 1e-6) or (not whole and total >= 1):
        raise UserError(
            f"The shares of the texts add up to {total:g}.",
            "They must add up to "
            + ("1." if whole else "less than 1, and leave something for the text without a share."),
        )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(
            f"There is no text at {path}.",
            "Give files (.txt, .jsonl), folders of them, or datasets:NAME.",
        )
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"{path} has the suffix {path.suffix or '(none)'}; plain text is read from "
                f"{' and '.join(SUFFIXES)} files.",
                "Rename or convert the file; labelled tables are for `train adapt` and `train finetune`.",
            )
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"The folder {path} has no {' or '.join(SUFFIXES)} file.", "Choose another folder.")
    return files


def _read_file(path: Path, text_field: str) -> TextSource:
    lines = read_lines(path)
    documents = ("\n".join(lines),) if path.suffix == ".txt" else tuple(_documents(path, lines, text_field))
    return TextSource(path.name, sha256_file(path), documents)


def _documents(path: Path, lines: Sequence[str], text_field: str) -> Iterable[str]:
    for place, row in json_rows(path, lines):
        yield _text(place, row, text_field)


def _text(place: str, row: Mapping[str, Any], text_field: str) -> str:
    value = row.get(text_field)
    if not isinstance(value, str):
        raise UserError(
            f"{place} has no text in the field {text_field!r}; found: {', '.join(row)}.",
            "Name the field that holds the text: --text-field NAME",
        )
    if not value.strip():
        raise UserError(f"{place} has an empty text.", "Remove the text.")
    return value


def _read_dataset(source: str, text_field: str) -> TextSource:
    rows = read_dataset(source, (text_field,), "--text-field")
    documents = tuple(
        _text(f"{source}, row {number}", row, text_field) for number, row in enumerate(rows, start=1)
    )
    return TextSource(source, sha256_json(list(documents)), documents)
