"""Labels of a classifier, as a config.json has them."""

from collections.abc import Iterable
from typing import Any


def labels_config(labels: Iterable[str]) -> dict[str, Any]:
    """What config.json says of a classifier with these labels, of which exactly one fits a text."""
    names = list(labels)
    return {
        "id2label": {str(index): label for index, label in enumerate(names)},
        "label2id": {label: index for index, label in enumerate(names)},
        "problem_type": "single_label_classification",
    }
