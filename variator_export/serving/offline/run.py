"""Sentence embeddings of a file of texts, written to a file."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from variator_export.core import interrupts
from variator_export.core.environment import default_threads
from variator_export.core.errors import UsageError
from variator_export.serving.offline.embedder import Embedder, OnBatch
from variator_export.serving.offline.formats import find_format
from variator_export.serving.offline.parts import Part, Parts
from variator_export.serving.offline.pool import embed_in_processes
from variator_export.serving.offline.progress import EmbedProgress
from variator_export.serving.offline.settings import EmbedSettings, available_cores
from variator_export.serving.offline.source import Chunk, TextSource
from variator_export.serving.offline.unfinished import claim
from variator_export.sessions import Bundle


@dataclass(frozen=True)
class EmbedResult:
    """What a run did.

    Attributes:
        texts: Number of texts.
        tokens: Their tokens, special tokens included, padding not.
        truncated: Number of texts that were truncated to the model's limit.
        resumed_texts: Number of texts that an earlier, unfinished run had embedded.
        seconds: Time from the open session to the last finished chunk.
        texts_per_second: Texts that this run embedded, by `seconds`.
        tokens_per_second: Tokens that this run embedded, by `seconds`.
        hidden_size: Numbers of a vector.
        file: The output.
    """

    texts: int
    tokens: int
    truncated: int
    resumed_texts: int
    seconds: float
    texts_per_second: float
    tokens_per_second: float
    hidden_size: int
    file: str


def embed_file(
    source: TextSource,
    output: Path,
    settings: EmbedSettings,
    *,
    processes: int = 1,
    restart: bool = False,
    replace: bool = False,
    progress: EmbedProgress | None = None,
) -> EmbedResult:
    """Embed the texts of a file, in constant memory.

    The run may be killed at any moment. The same call goes on after the last finished chunks, and writes the
    same bytes as a run that was never killed. The parts of an unfinished run lie in `OUTPUT.parts`; the disk
    holds them and the output at the end.

    Args:
        source: The texts.
        output: `.parquet`, `.npy` or `.jsonl`; it appears when it is complete.
        settings: How texts become vectors.
        processes: Number of processes, each with a session of its own. With several, `settings.threads` of
            None means an equal share of the cores.
        restart: Whether to discard an unfinished run instead of resuming it.
        replace: Whether to replace an existing output.
        progress: Listener.

    Raises:
        UserError: The bundle, the input or the output cannot be used; another run is writing the output; the
            unfinished run had other settings; or a process was killed. What is finished is kept.
    """
    output_format = find_format(output)
    _check(source, output, settings, has_ids=output_format.has_ids)
    if processes > 1 and settings.threads is None:
        share = max(1, (default_threads() or available_cores()) // processes)
        settings = dataclasses.replace(settings, threads=share)
    identity = settings.identity(Bundle.load(settings.bundle), output_format)
    progress = EmbedProgress() if progress is None else progress
    with claim(
        output, identity, with_text=settings.with_text, restart=restart, replace=replace
    ) as unfinished:
        if unfinished.finished is not None:
            return _of_an_earlier_run(EmbedResult(**unfinished.finished))
        result, num_parts = _embed(source, output, settings, unfinished.parts, processes, progress)
        progress.assembling()
        unfinished.finish(num_parts, (result.texts, result.hidden_size), asdict(result))
    return result


@dataclass
class _Total:
    """The sum of parts."""

    parts: int = 0
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    hidden_size: int = 0

    def add(self, part: Part) -> None:
        self.parts += 1
        self.texts += part.texts
        self.tokens += part.tokens
        self.truncated += part.truncated
        self.hidden_size = part.hidden_size


def _embed(
    source: TextSource,
    output: Path,
    settings: EmbedSettings,
    parts: Parts,
    processes: int,
    progress: EmbedProgress,
) -> tuple[EmbedResult, int]:
    """Embed the chunks that have no part yet. Returns the result and the number of parts."""
    made, reused = _Total(), _Total()
    started = time.monotonic()

    def opened() -> None:
        nonlocal started
        started = time.monotonic()
        progress.opened()

    def missing() -> Iterator[Chunk]:
        for chunk in source.chunks(settings.chunk_size):
            progress.expected_texts = source.expected_texts
            part = parts.find(chunk)
            if part is None:
                yield chunk
            else:
                reused.add(part)
                progress.resumed_texts = reused.texts

    if processes == 1:
        new = _embed_here(settings, parts, missing(), opened, progress.advanced)
    else:
        new = embed_in_processes(settings, parts, missing(), opened, progress.advanced, processes)
    with contextlib.closing(new):
        for part in new:
            made.add(part)
    seconds = time.monotonic() - started
    result = EmbedResult(
        texts=made.texts + reused.texts,
        tokens=made.tokens + reused.tokens,
        truncated=made.truncated + reused.truncated,
        resumed_texts=reused.texts,
        seconds=round(seconds, 3),
        texts_per_second=round(made.texts / seconds, 1),
        tokens_per_second=round(made.tokens / seconds, 1),
        hidden_size=made.hidden_size or reused.hidden_size,
        file=str(output),
    )
    return result, made.parts + reused.parts


def _embed_here(
    settings: EmbedSettings,
    parts: Parts,
    chunks: Iterator[Chunk],
    on_ready: Callable[[], None],
    on_batch: OnBatch,
) -> Generator[Part, None, None]:
    """Embed chunks in this process and write their parts, as `embed_in_processes` does in others."""

    def count(texts: int, tokens: int) -> None:
        interrupts.raise_if_interrupted()
        on_batch(texts, tokens)

    embedder = Embedder(settings, count)
    on_ready()
    for embedded in embedder.chunks(chunks):
        yield parts.write(embedded)


def _of_an_earlier_run(result: EmbedResult) -> EmbedResult:
    """The result of a run that had nothing left to do but to remove its parts."""
    return dataclasses.replace(
        result, resumed_texts=result.texts, seconds=0.0, texts_per_second=0.0, tokens_per_second=0.0
    )


def _check(source: TextSource, output: Path, settings: EmbedSettings, *, has_ids: bool) -> None:
    if not has_ids and (source.has_ids or settings.with_text):
        raise UsageError(
            f"A {output.suffix} file holds vectors only, without ids or texts.",
            "Leave out --id-column and --with-text, or write .parquet or .jsonl.",
        )
    if source.path is not None and output.exists() and output.samefile(source.path):
        raise UsageError(f"{output} is both the input and the output.", "Choose another --output.")
