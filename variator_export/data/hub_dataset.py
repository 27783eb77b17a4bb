"""Rows of a data set that the `datasets` library reads: from the hub, its cache, or a local folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from variator_export.core.environment import require
from variator_export.core.errors import UserError

PREFIX = "datasets:"


@dataclass(frozen=True)
class DatasetRows:
    """The rows of one split.

    Attributes:
        name: As it was asked for, with configuration and split.
        fingerprint: What `datasets` calls the state of the data.
        columns: The names of the columns.
        rows: A mapping by column for each row. Class labels have their names.
    """

    name: str
    fingerprint: str
    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]


def is_dataset(source: str) -> bool:
    """Whether a source is `datasets:NAME[,CONFIG][,SPLIT]`."""
    return source.startswith(PREFIX)


def read_dataset(source: str) -> DatasetRows:
    """Read `datasets:NAME[,CONFIG],SPLIT`; the split defaults to `train`.

    Raises:
        UserError: The library is not installed, or it cannot find or read the data set.
    """
    require("datasets", "train", "Reading a data set by its name")
    import datasets

    parts = source.removeprefix(PREFIX).split(",")
    if not all(parts) or len(parts) > 3:
        raise UserError(
            f"The data set {source} is not written as {PREFIX}NAME, {PREFIX}NAME,SPLIT or "
            f"{PREFIX}NAME,CONFIG,SPLIT.",
            f"For example: {PREFIX}glue,sst2,train",
        )
    name, split = parts[0], parts[-1] if len(parts) > 1 else "train"
    config = parts[1] if len(parts) == 3 else None
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # datasets, huggingface_hub and the network each raise their own
        raise UserError(
            f"datasets {datasets.__version__} cannot read {source}: {type(error).__name__}: {error}",
            "Check the name, the split and the network, or give a local file instead.",
        ) from error
    labels = {name: f for name, f in found.features.items() if isinstance(f, datasets.ClassLabel)}
    rows = [
        {
            column: labels[column].int2str(value) if column in labels and value is not None else value
            for column, value in row.items()
        }
        for row in found
    ]
    if not rows:
        raise UserError(f"{source} has no rows.", "Choose another split.")
    return DatasetRows(source, str(found._fingerprint), tuple(found.column_names), rows)
