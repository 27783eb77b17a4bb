"""The contract of a task that quality is measured on."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tokenizers import Encoding

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.engines.base import Arrays
from variator_export.quality.metrics import Metrics
from variator_export.text.predictions import takes_prompt
from variator_export.text.tokenizer import TextEncoder, TokenRow, token_row

# What is kept of each row's outputs, in the order of the rows.
Kept = Sequence[np.ndarray]


@dataclass(frozen=True)
class EvaluatedModel:
    """What a task asks about a model.

    Attributes:
        source: The model's source, for messages.
        task: The model's task, as Optimum names it. None if it is not known.
        outputs: Names of the outputs.
        token_outputs: Names of the outputs with one row for each token.
        config: The content of the model's config.json.
    """

    source: str
    task: str | None
    outputs: Sequence[str]
    token_outputs: Sequence[str]
    config: Mapping[str, Any]

    @property
    def text_outputs(self) -> list[str]:
        """Names of the outputs that describe a text as a whole."""
        return [name for name in self.outputs if name not in self.token_outputs]


@dataclass(frozen=True)
class Encode:
    """Function from texts to encodings, with the limit and the prompt of this evaluation.

    Attributes:
        encoder: The model's tokenizer.
        limit: The longest text in tokens. None if there is no limit.
        prompt_name: The model's prompt to put before each text. None for its default prompt.
        task: The model's task, which decides whether there is a prompt at all.
    """

    encoder: TextEncoder
    limit: int | None
    prompt_name: str | None
    task: str | None

    def __call__(self, texts: Iterable[str], pairs: Iterable[str] | None = None) -> list[Encoding]:
        """Encode texts."""
        name, prompt = (self.prompt_name, None) if takes_prompt(self.task) else (None, "")
        return self.encoder.encodings(texts, self.limit, pairs=pairs, prompt_name=name, prompt=prompt)

    def rows(self, texts: Iterable[str], pairs: Iterable[str] | None = None) -> list[TokenRow]:
        """Encode texts as token rows."""
        return [token_row(encoding) for encoding in self(texts, pairs)]


class Measurement(ABC):
    """A task on one data set.

    Attributes:
        metric: The metric in which losses are counted. Larger is better.
        rows: The rows to run the model on.
        generates: Whether the model generates text (`quality.generating`); its outputs are tokens then, and
            what is compared are texts.
    """

    metric: str
    rows: Sequence[TokenRow]
    generates: ClassVar[bool] = False

    @abstractmethod
    def keep(self, row: int, outputs: Arrays) -> np.ndarray:
        """Return what is needed of a row's outputs, which are without a batch axis."""

    @abstractmethod
    def measure(self, kept: Kept, uncompressed: Kept) -> Metrics:
        """Compute the metrics of a variant, from what was kept of it and of the uncompressed model."""

    def compared(self, kept: Kept) -> np.ndarray:
        """What eager PyTorch and the exported graph must agree in: numbers (n,), or generated texts (n,)."""
        return np.concatenate([values.ravel() for values in kept])

    def warnings(self, kept: Kept) -> list[str]:
        """Reasons to doubt the metrics."""
        return []


class EvaluationTask(ABC):
    """A task that quality is measured on.

    Attributes:
        name: Name of the task.
    """

    name: ClassVar[str]

    def unfit_model(self, model: EvaluatedModel) -> UserError | None:
        """The reason why the task cannot be measured on a model. None if it can be.

        By default, the model's task must have the name of this one.
        """
        if model.task == self.name:
            return None
        return UserError(
            f"{model.source} is a model for {model.task}, not for {self.name}.", "Choose another --task."
        )

    def unfit_data(self, examples: Examples) -> UserError | None:
        """The reason why the examples do not fit the task. None if they do, as any texts do by default."""
        return None

    @abstractmethod
    def measurement(self, model: EvaluatedModel, examples: Examples, encode: Encode) -> Measurement:
        """Prepare the task on examples.

        Raises:
            UserError: A text or a target does not fit the model.
        """


def needs_output(task: str, model: EvaluatedModel, output: str, hint: str) -> UserError | None:
    """The error for a model without an output for each text. None if the model has the output."""
    there = model.text_outputs
    if output in there:
        return None
    return UserError(
        f"The task {task} needs the output {output} for each text; {model.source} returns "
        f"{', '.join(there) or 'only outputs for each token'}.",
        hint,
    )


def needs_targets(task: str, examples: Examples, what: str = "labels or scores") -> UserError | None:
    """The error for examples that were read without targets. None if they have targets."""
    if examples.targets is not None:
        return None
    return UserError(f"The task {task} needs {what}.", "Name their column: --label-column NAME")
