"""A bundle that is ready to serve: its session, tokenizer, qualities and times."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.engines.batches import run_rows
from variator_export.engines.target import Session
from variator_export.inference import EMBEDDING, TextModel
from variator_export.serving.calibration import calibrate, token_budget
from variator_export.serving.variants import ServedVariant, Variants, read_variants
from variator_export.sessions import Bundle
from variator_export.text.predictions import TASKS
from variator_export.text.tokenizer import TokenRow

# The length in tokens that decides how many tokens make a full batch, for models that take so many.
_USUAL_LENGTH = 128


@dataclass(frozen=True)
class ModelOptions:
    """How a bundle is opened for serving.

    Attributes:
        target: The runtime, as for `Bundle.session`.
        threads: Threads per operator, for runtimes on a CPU.
        metric: The metric whose loss counts. None for the main metric of the bundle's task.
        max_loss: The largest loss that any answer may have, as a share. None for every variant.
        index: Serve only the best quality, to make an index with.
        allow_unknown_quality: Serve a bundle without a stored evaluation.
        calibration_seconds: The time to measure batches at start.
        allow_unverified: Run an engine that was never verified on a device.
        lean_runtime: Library of the lean runtime of the TensorRT that built the engines.
    """

    target: str = "onnxruntime"
    threads: int | None = None
    metric: str | None = None
    max_loss: float | None = None
    index: bool = False
    allow_unknown_quality: bool = False
    calibration_seconds: float = 4.0
    allow_unverified: bool = False
    lean_runtime: Path | None = None


class ServedModel:
    """A bundle, opened and calibrated.

    Attributes:
        bundle: The bundle.
        name: The name that requests use for it.
        text: The bundle's tokenizer, and predictions from outputs.
        variants: The variants that requests may run at.
        cost: The time of a batch, calibrated on this machine.
        max_batch_tokens: The number of padded tokens that make a full batch on this machine.
    """

    def __init__(
        self, bundle: Bundle, session: Session, variants: Variants, name: str, calibration_seconds: float
    ) -> None:
        self.bundle, self.variants, self.name = bundle, variants, name
        self.text: TextModel = bundle.text_model(session=session)
        backbone = bundle.manifest.backbone
        self._session, self._inputs = session, backbone.inputs
        self._token_outputs = backbone.token_outputs
        self._kept = (EMBEDDING,) if EMBEDDING in backbone.outputs else backbone.outputs
        longest = self._longest = self.text.encoder.max_length or backbone.max_length or 512
        self.cost, _ = calibrate(self._run_shape, variants, longest, calibration_seconds)
        self.max_batch_tokens = token_budget(self.cost, variants, min(_USUAL_LENGTH, longest))

    @classmethod
    def open(cls, path: str | Path, options: ModelOptions = ModelOptions()) -> "ServedModel":
        """Open a bundle, and measure how long its batches take.

        Args:
            path: The bundle's folder, or `ORGANISATION/NAME[@REVISION]` on the Hugging Face Hub.
            options: How it is opened.

        Raises:
            UserError: The bundle cannot be opened or has nothing to serve, what it loses is not known, or no
                variant loses as little as was asked for.
        """
        bundle = Bundle.load(path)
        bundle.refuse_decoder("serve")
        task = bundle.manifest.backbone.task
        if EMBEDDING not in bundle.manifest.backbone.outputs and task not in TASKS:
            raise UserError(
                f"{path} has neither sentence embeddings nor a task with predictions: its task is {task}.",
                "Build from a folder with the sentence-transformers files (modules.json), or another task.",
            )
        variants = read_variants(bundle, options.metric, allow_unknown_quality=options.allow_unknown_quality)
        if options.max_loss is not None:
            kept = variants.within(options.max_loss)
            variants = Variants([variants.all[level] for level in kept], variants.metric)
        if options.index:
            variants = Variants(variants.all[:1], variants.metric)
        session = bundle.session(
            options.target,
            threads=options.threads,
            allow_unverified=options.allow_unverified,
            lean_runtime=options.lean_runtime,
        )
        return cls(bundle, session, variants, bundle.manifest.recipe["name"], options.calibration_seconds)

    @property
    def embeds(self) -> bool:
        """Whether the model has sentence embeddings."""
        return self._kept == (EMBEDDING,)

    @property
    def untrained(self) -> list[str]:
        """Names of the variants whose plugin was only initialised."""
        served = {variant.name for variant in self.variants.all}
        return [
            v.name
            for v in self.bundle.manifest.variants
            if v.name in served and v.plugin is not None and not v.plugin.trained
        ]

    def run(self, rows: Sequence[TokenRow], variant: ServedVariant) -> list[Arrays]:
        """Run rows as one batch.

        Args:
            rows: The rows, of similar length.
            variant: The variant to run.

        Returns:
            The outputs of each row by name, `sentence_embedding` (hidden size,) or the outputs of the task.

        Raises:
            UserError: The runtime refuses the rows, or an embedding is not finite.
        """
        found = dict(
            run_rows(
                lambda inputs: self._session.run(inputs, ratio=variant.name, outputs=self._kept),
                rows,
                self._inputs,
                pad_token_id=self.text.encoder.pad_token_id,
                token_outputs=self._token_outputs,
                batch_size=len(rows),
            )
        )
        kept = [found[index] for index in range(len(rows))]
        if not all(np.isfinite(values).all() for row in kept for values in row.values()):
            raise UserError("The model's output is not finite.", "Send another text, or another ratio.")
        return kept

    def probe(self) -> None:
        """Run a row that is known to work.

        Raises:
            Exception: What the runtime raises if it is broken.
        """
        self._run_shape(self.variants.all[0].name, 1, min(16, self._longest))

    def _run_shape(self, variant: str, rows: int, length: int) -> None:
        """Run a batch of a shape, for its time."""
        shape = (rows, length)
        inputs = {name: np.zeros(shape, np.int64) for name in self._inputs}
        inputs["input_ids"][:] = self.text.encoder.pad_token_id
        inputs["attention_mask"][:] = 1
        self._session.run(inputs, ratio=variant, outputs=self._kept)
