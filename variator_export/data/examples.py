"""Labelled examples: texts with their labels or scores."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from variator_export.core.errors import UserError

# A label or score as it is written in the data, or several: the tags of words, labels, accepted answers.
Target = str | tuple[str, ...]
Value = TypeVar("Value")
# What transformers names a class that has no name, before its index.
_UNNAMED = "LABEL_"


@dataclass(frozen=True)
class Columns:
    """The columns to read, by name, or by number from 1 for a table without a header.

    Attributes:
        text: The column of the text.
        pair: The column of the second text of a pair. None if there is none.
        target: The column of the class label or the score, or of several labels. None to read only text.
        header: Whether the first line of a table names the columns.
    """

    text: str = "text"
    pair: str | None = None
    target: str | None = "label"
    header: bool = True

    @property
    def by_option(self) -> dict[str, str | None]:
        """The columns by the option of the command line that names them."""
        return {"--text-column": self.text, "--pair-column": self.pair, "--label-column": self.target}


@dataclass(frozen=True)
class Examples:
    """Texts with their labels or scores.

    Attributes:
        name: The file's name without its folder, or the data set as requested.
        sha256: Hash of the file, or of the rows read from the data set.
        columns: The columns that the examples were read from.
        texts: The text of each example. A list of words in the data becomes a text with spaces between them.
        pairs: The second texts. None if there are none.
        targets: Class labels or scores, as written in the data. None if not requested.
        places: The place of each example in the data, for messages.
    """

    name: str
    sha256: str
    columns: Columns
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    targets: tuple[Target, ...] | None
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def labels(self) -> list[str]:
        """The label or score of each example, of which there must be exactly one.

        Raises:
            UserError: An example has a list of labels.
        """
        single = []
        for place, target in zip(self.places, self.targets or (), strict=True):
            if not isinstance(target, str):
                raise UserError(
                    f"{place}: the column {self.columns.target!r} holds {len(target)} values, not one.",
                    "Choose another column.",
                )
            single.append(target)
        return single

    def alternatives(self) -> list[tuple[str, ...]]:
        """The targets of each example of which any one is right."""
        return [(target,) if isinstance(target, str) else target for target in self.targets or ()]

    def label_lists(self, separator: str | None) -> list[tuple[str, ...]]:
        """The labels of each example.

        Args:
            separator: What stands between the labels in the cell of a table. None for white space.
        """
        return [
            tuple(part.strip() for part in target.split(separator)) if isinstance(target, str) else target
            for target in self.targets or ()
        ]

    def scores(self) -> list[float]:
        """The targets as numbers.

        Raises:
            UserError: A target is not a number, or all are equal, which leaves nothing to rank.
        """
        values = []
        for place, target in zip(self.places, self.labels(), strict=True):
            value = _number(target)
            if value is None:
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
            UserError: The data has only one class, or scores instead of classes.
        """
        labels = self.labels()
        found = Counter(labels)
        if len(found) < 2:
            raise UserError(
                f"All {len(self)} examples of {self.name} have the label {next(iter(found))!r}: there is "
                "nothing to learn.",
                "Check the label column, and that the file was not cut from sorted data.",
            )
        if all(label.removeprefix("-").isdecimal() for label in found):
            return sorted(found, key=int)
        numbers = [_number(label) for label in found]
        if None not in numbers and any(number != int(number or 0) for number in numbers):
            raise UserError(
                f"The column {self.columns.target!r} of {self.name} holds scores, such as "
                f"{next(label for label in labels if not label.isdecimal())}; a classifier learns classes.",
                "Choose another column, or turn the scores into classes first.",
            )
        return sorted(found)

    def class_indices(self, label2id: Mapping[str, int]) -> list[int]:
        """The class index of each example, which has one label.

        Raises:
            UserError: The classifier does not have one of the labels.
        """
        return [
            self.class_index(label, label2id, place)
            for place, label in zip(self.places, self.labels(), strict=True)
        ]

    def class_index(self, label: str, label2id: Mapping[str, int], place: str) -> int:
        """The class index of a label. A number is a class index if the classifier's classes have no names.

        Raises:
            UserError: The classifier does not have the label.
        """
        for name in (label, f"{_UNNAMED}{label}" if label.isdecimal() else label):
            if name in label2id:
                return int(label2id[name])
        raise UserError(
            f"{place}: the label {label!r} is not one of the classifier's: {', '.join(label2id)}.",
            f"Correct it, name the right column with --label-column, or say which class it is: "
            f"--label-map {label}={next(iter(label2id), 'LABEL')}",
        )

    def relabelled(self, names: Mapping[str, str]) -> "Examples":
        """The examples with other labels.

        Args:
            names: New labels by the labels in the data. Other labels stay.

        Raises:
            UserError: A label to replace is not in the data, or the examples were read without labels.
        """
        if not names:
            return self
        lists = [target if isinstance(target, tuple) else (target,) for target in self.targets or ()]
        there = {label for labels in lists for label in labels}
        for name in names:
            if name not in there:
                listed = ", ".join(repr(label) for label in sorted(there)[:12]) or "none"
                raise UserError(
                    f"{self.name} has no label {name!r}; its labels are {listed}.",
                    "Correct --label-map, or name the right column with --label-column.",
                )
        assert self.targets is not None
        return dataclasses.replace(
            self,
            targets=tuple(
                names.get(target, target)
                if isinstance(target, str)
                else tuple(names.get(label, label) for label in target)
                for target in self.targets
            ),
        )

    def select(self, indices: Sequence[int]) -> "Examples":
        """Some of the examples, in the given order."""

        def pick(values: tuple[Value, ...] | None) -> tuple[Value, ...] | None:
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


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
