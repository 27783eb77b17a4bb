"""Embedding on several machines with Ray Data: `dataset.map_batches(EmbedTexts, …)`.

Ray creates one object for each worker, which opens its own session. This module does not import Ray.
"""

from typing import Any

import numpy as np

from variator_export.data.example_files import check_columns
from variator_export.engines.batches import BATCH_SIZE
from variator_export.sessions import Bundle


class EmbedTexts:
    """Adds a column of sentence embeddings to batches of rows.

    Args:
        bundle: The bundle's folder, which every machine must have under this path; or
            `ORGANISATION/NAME[@REVISION]` on the Hugging Face Hub.
        ratio: The ratio, or the name of a variant.
        text_column: The column of the texts.
        output_column: The column to add.
        batch_size: The largest number of texts to run at once. The rows of a batch of Ray run in batches of
            similar length, so give Ray larger ones.
        prompt_name: The prompt to put before each text; None for the model's default prompt.
        prompt: The text of a prompt, instead of its name; empty for no prompt.
        target: The runtime, as for `Bundle.session`.
        threads: Threads on a CPU; None for `OMP_NUM_THREADS`, which Ray sets to the worker's `num_cpus`.

    Raises:
        UserError: The session cannot be opened on this machine, or the model has no sentence embeddings.
    """

    def __init__(
        self,
        bundle: str,
        *,
        ratio: int | str = 1,
        text_column: str = "text",
        output_column: str = "embedding",
        batch_size: int = BATCH_SIZE,
        prompt_name: str | None = None,
        prompt: str | None = None,
        target: str = "onnxruntime",
        threads: int | None = None,
    ) -> None:
        loaded = Bundle.load(bundle)
        variant = loaded.variant(ratio).name
        session = loaded.session(target, variant, threads=threads)
        self._model = loaded.text_model(variant, session=session)
        self._model.check_embeds()
        self._text_column, self._output_column = text_column, output_column
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "prompt_name": prompt_name,
            "prompt": prompt,
        }

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add the vectors of a batch, float32 (number of rows, hidden size).

        Args:
            batch: Arrays by column, in Ray's batch format `numpy`.

        Raises:
            UserError: There is no column of that name, or a text is not a string; the message names its row.
        """
        check_columns("The data set", {"text_column=": self._text_column}, tuple(batch))
        return {**batch, self._output_column: self._model.embed(batch[self._text_column], **self._options)}
