"""Rows of a data set, read by the `datasets` library from the hub, its cache or a local folder."""

from collections.abc import Sequence
from typing import Any

from variator_export.core.environment import require
from variator_export.core.errors import UserError

PREFIX = "datasets:"


def is_dataset(source: str) -> bool:
    """Whether a source is `datasets:NAME[,CONFIG][,SPLIT]`."""
    return source.startswith(PREFIX)


def read_dataset(source: str, columns: Sequence[str], option: str) -> list[dict[str, Any]]:
    """The rows of `datasets:NAME[,CONFIG],SPLIT`, by column; the split defaults to `train`.

    Class labels are returned by name, also in lists of them.

    Args:
        source: The data set to read.
        columns: The columns to read.
        option: The option that names a column, for messages.

    Raises:
        UserError: The library is not installed or cannot find or read the data set, or a column is missing.
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
    except Exception as error:  # datasets, huggingface_hub and the network raise their own errors
        raise UserError(
            f"datasets {datasets.__version__} cannot read {source}: {type(error).__name__}: {error}",
            "Check the name, the split and the network, or give a local file instead.",
        ) from error
    for column in columns:
        if column not in found.column_names:
            raise UserError(
                f"{source} has no column {column!r}; it has {', '.join(found.column_names)}.",
                f"Name the right one with {option}.",
            )
    chosen = found.select_columns(list(dict.fromkeys(columns)))
    # A list's feature is that of its items.
    features = {n: getattr(feature, "feature", feature) for n, feature in chosen.features.items()}
    labels = {n: feature for n, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    rows = [{n: _value(value, labels.get(n)) for n, value in row.items()} for row in chosen]
    if not rows:
        raise UserError(f"{source} has no rows.", "Choose another split.")
    return rows


def _value(value: Any, label: Any) -> Any:
    """A value with class labels by name; test splits use -1 for an undisclosed class."""
    if label is None or value is None:
        return value
    if isinstance(value, list):
        return [_value(item, label) for item in value]
    return label.int2str(value) if value >= 0 else None
