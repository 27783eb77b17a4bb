"""Quality of models with logits for each text: one class, any number of classes, or a score."""

from collections.abc import Sequence

import numpy as np

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.engines.base import Arrays
from variator_export.quality.metrics import (
    Metrics,
    classification_metrics,
    correlation_metrics,
    multi_label_metrics,
)
from variator_export.quality.tasks.base import (
    Encode,
    EvaluatedModel,
    EvaluationTask,
    Kept,
    Measurement,
    needs_output,
    needs_targets,
)
from variator_export.text.predictions import Labels
from variator_export.text.tokenizer import TokenRow

# The separator of labels in the cell of a table.
_SEPARATOR = ","


class _OfLogits(Measurement):
    """A measurement of logits (C,) for each text."""

    def __init__(self, rows: Sequence[TokenRow], labels: Labels) -> None:
        self.rows = rows
        self.labels = labels

    def keep(self, row: int, outputs: Arrays) -> np.ndarray:
        """Return the logits, (C,)."""
        logits = outputs["logits"]
        if logits.shape[-1] != len(self.labels.names):
            raise UserError(
                f"The model has {logits.shape[-1]} classes; its config.json names {len(self.labels.names)}.",
                "Restore config.json from the model's source.",
            )
        return logits


class _OneClass(_OfLogits):
    metric = "accuracy"

    def __init__(self, rows: Sequence[TokenRow], labels: Labels, classes: Sequence[int]) -> None:
        super().__init__(rows, labels)
        self._classes = classes

    def measure(self, kept: Kept, uncompressed: Kept) -> Metrics:
        return classification_metrics(np.stack(kept), np.stack(uncompressed), self._classes)

    def warnings(self, kept: Kept) -> list[str]:
        found = set(np.stack(kept).argmax(-1).tolist())
        if len(found) > 1 or len(set(self._classes)) < 2:
            return []
        return [
            f"says {self.labels.names[found.pop()]} for every text, although the examples have "
            f"{len(set(self._classes))} classes"
        ]


class _Classes(_OfLogits):
    metric = "f1"

    def __init__(self, rows: Sequence[TokenRow], labels: Labels, classes: np.ndarray) -> None:
        super().__init__(rows, labels)
        self._classes = classes

    def measure(self, kept: Kept, uncompressed: Kept) -> Metrics:
        # A class is predicted if its sigmoid is above one half.
        return multi_label_metrics(np.stack(kept) > 0, np.stack(uncompressed) > 0, self._classes)

    def warnings(self, kept: Kept) -> list[str]:
        found = np.stack(kept) > 0
        if (found == found[0]).all() and not (self._classes == self._classes[0]).all():
            return ["says the same classes for every text"]
        return []


class _Score(_OfLogits):
    metric = "spearman"

    def __init__(self, rows: Sequence[TokenRow], labels: Labels, scores: Sequence[float]) -> None:
        super().__init__(rows, labels)
        self._scores = scores

    def measure(self, kept: Kept, uncompressed: Kept) -> Metrics:
        return correlation_metrics(self.labels.scores(np.stack(kept))[:, 0], self._scores)

    def warnings(self, kept: Kept) -> list[str]:
        return ["has the same score for every text"] if np.ptp(np.stack(kept)) == 0 else []


class _LogitsTask(EvaluationTask):
    """A task on the logits of texts or pairs."""

    def unfit_model(self, model: EvaluatedModel) -> UserError | None:
        if (missing := needs_output(self.name, model, "logits", "Choose another --task.")) is not None:
            return missing
        own = _kind(model)
        if own == self.name:
            return None
        return UserError(
            f"The task {self.name} does not fit {model.source}: its config.json describes {own}.",
            f"--task {own}",
        )

    def unfit_data(self, examples: Examples) -> UserError | None:
        return needs_targets(self.name, examples)


class Classification(_LogitsTask):
    """One class for each text or pair."""

    name = "classification"

    def measurement(self, model: EvaluatedModel, examples: Examples, encode: Encode) -> Measurement:
        labels = Labels.of_config(model.config)
        classes = examples.class_indices(labels.ids())
        return _OneClass(encode.rows(examples.texts, examples.pairs), labels, classes)


class MultiLabel(_LogitsTask):
    """Any number of classes for each text or pair."""

    name = "multi-label"

    def measurement(self, model: EvaluatedModel, examples: Examples, encode: Encode) -> Measurement:
        labels = Labels.of_config(model.config)
        ids = labels.ids()
        classes = np.zeros((len(examples), len(labels.names)), bool)
        for row, (place, names) in enumerate(
            zip(examples.places, examples.label_lists(_SEPARATOR), strict=True)
        ):
            for name in names:
                classes[row, examples.class_index(name, ids, place)] = True
        return _Classes(encode.rows(examples.texts, examples.pairs), labels, classes)


class Regression(_LogitsTask):
    """A score for each text or pair."""

    name = "regression"

    def measurement(self, model: EvaluatedModel, examples: Examples, encode: Encode) -> Measurement:
        return _Score(
            encode.rows(examples.texts, examples.pairs), Labels.of_config(model.config), examples.scores()
        )


CLASSIFICATION = Classification()
MULTI_LABEL = MultiLabel()
REGRESSION = Regression()


def _kind(model: EvaluatedModel) -> str:
    """The task that a model with logits was trained for, by its config.json."""
    labels = Labels.of_config(model.config)
    if len(labels.names) == 1 or model.config.get("problem_type") == "regression":
        return Regression.name
    several = model.config.get("problem_type") == "multi_label_classification"
    return MultiLabel.name if several else Classification.name
