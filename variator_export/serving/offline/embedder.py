"""From chunks of texts to vectors, in one process."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.inference import Run
from variator_export.serving.offline.settings import EmbedSettings
from variator_export.serving.offline.source import Chunk
from variator_export.sessions import Bundle
from variator_export.text.tokenizer import TokenRow, token_row

# Texts that are encoded at once. The tokenizer's own results are a hundred times as large as the token ids.
_ENCODED_AT_ONCE = 256

# Called after each batch with its number of texts and of tokens, without padding.
OnBatch = Callable[[int, int], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Embedded:
    """The vectors of a chunk.

    Attributes:
        chunk: The chunk.
        vectors: float32 (number of texts, hidden size), in the order of the texts.
        tokens: Number of tokens of all texts, special tokens included.
        truncated: Number of texts that were truncated.
    """

    chunk: Chunk
    vectors: np.ndarray
    tokens: int
    truncated: int


class Embedder:
    """An open session with its tokenizer.

    Args:
        settings: The settings of the run.
        on_batch: Called after each batch.

    Raises:
        UserError: The session cannot be opened here, or the model has no sentence embeddings.
    """

    def __init__(self, settings: EmbedSettings, on_batch: OnBatch | None = None) -> None:
        bundle = Bundle.load(settings.bundle)
        session = bundle.session(
            settings.target,
            settings.variant,
            threads=settings.threads,
            allow_unverified=settings.allow_unverified,
            lean_runtime=settings.lean_runtime,
        )
        self._settings = settings
        self._model = bundle.text_model(settings.variant, session=session)
        self._model.check_embeds()
        if on_batch is not None:
            self._model = dataclasses.replace(self._model, run=_counting(self._model.run, on_batch))

    def chunks(self, chunks: Iterator[Chunk]) -> Iterator[Embedded]:
        """The vectors of chunks. The next chunk is read and encoded in a thread while one runs.

        Raises:
            UserError: A text cannot be encoded, or is too long and may not be truncated; or a vector is not
                finite. The message names the text's place. The chunks before are yielded first.
        """
        for chunk, rows in one_ahead((chunk, self.encode(chunk)) for chunk in chunks):
            vectors = self.vectors(rows)
            if not (finite := np.isfinite(vectors).all(axis=1)).all():
                raise UserError(
                    f"{chunk.places[int(np.argmin(finite))]}: the vector of this text holds numbers that are "
                    "not finite.",
                    "Run a float32 bundle; variator-export verify compares a bundle with eager PyTorch.",
                )
            tokens, truncated = sum(len(row.ids) for row in rows), sum(row.truncated for row in rows)
            yield Embedded(chunk, vectors, tokens, truncated)

    def encode(self, chunk: Chunk) -> list[TokenRow]:
        """The token ids of a chunk's texts."""
        settings, rows = self._settings, list[TokenRow]()
        for start in range(0, len(chunk.texts), _ENCODED_AT_ONCE):
            encodings = self._model.encode(
                chunk.texts[start : start + _ENCODED_AT_ONCE],
                prompt_name=settings.prompt_name,
                prompt=settings.prompt,
            )
            rows += [token_row(encoding) for encoding in encodings]
        if not settings.truncate:
            long = next((place for place, row in enumerate(rows) if row.truncated), None)
            if long is not None:
                raise UserError(
                    f"{chunk.places[long]}: the text is longer than the model's limit of "
                    f"{self._model.encoder.max_length} tokens.",
                    "Shorten or split it, or run without --no-truncate.",
                )
        return rows

    def vectors(self, rows: list[TokenRow]) -> np.ndarray:
        """The vectors of encoded texts, float32 (number of texts, hidden size)."""
        vectors = self._model.embed_rows(rows, self._settings.batch_size).astype(np.float32, copy=False)
        if self._settings.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors


def _counting(run: Run, on_batch: OnBatch) -> Run:
    def run_and_count(inputs: Mapping[str, np.ndarray], wanted: Sequence[str] | None) -> Arrays:
        outputs = run(inputs, wanted)
        mask = inputs["attention_mask"]
        on_batch(len(mask), int(mask.sum()))
        return outputs

    return run_and_count


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items. Each is fetched in a thread while the caller works on the one before it.

    An error of the items is raised here, after those before it.
    """
    fetched: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    wanted = threading.Semaphore(1)
    closed = False

    def fetch() -> None:
        try:
            while wanted.acquire() and not closed:
                fetched.put((next(items), None))
        except BaseException as error:
            fetched.put((None, error))

    # A daemon, because it may wait for input that never comes when the process ends.
    threading.Thread(target=fetch, daemon=True).start()
    try:
        while True:
            item, error = fetched.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            wanted.release()
            yield item
    finally:
        closed = True
        wanted.release()
