"""Several processes that embed chunks, each with a session of its own and its share of the threads.

The parent reads the input and hands out chunks. A process encodes and runs them, and writes their parts.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from variator_export.core import interrupts
from variator_export.core.child_process import end_with_parent
from variator_export.core.errors import UserError
from variator_export.serving.offline.embedder import Embedder, OnBatch
from variator_export.serving.offline.parts import Part, Parts
from variator_export.serving.offline.settings import EmbedSettings
from variator_export.serving.offline.source import Chunk


def embed_in_processes(
    settings: EmbedSettings,
    parts: Parts,
    chunks: Iterator[Chunk],
    on_ready: Callable[[], None],
    on_batch: OnBatch,
    processes: int,
) -> Generator[Part, None, None]:
    """Embed chunks in several processes and write their parts.

    Args:
        settings: The settings of the run, with the threads of each process.
        parts: Where parts are written.
        chunks: The chunks.
        on_ready: Called when the first session is open.
        on_batch: Called after each batch.
        processes: Number of processes.

    Yields:
        The part of each chunk, once it is written, in no particular order.

    Raises:
        UserError: A process failed, or was killed. What the others were doing is given up.
    """
    context = multiprocessing.get_context("spawn")
    pool: dict[Connection, Any] = {}
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            pool[ours] = context.Process(target=_work, args=(theirs, settings, parts), daemon=True)
            pool[ours].start()
            theirs.close()
        yield from _Pool(pool, settings).run(chunks, on_ready, on_batch)
    finally:
        for process in pool.values():
            process.terminate()
        for connection, process in pool.items():
            process.join()
            connection.close()


class _Pool:
    """Gives chunks to processes and takes what they report.

    Args:
        processes: The processes, by the connection to each.
        settings: The settings of the run.
    """

    def __init__(self, processes: dict[Connection, Any], settings: EmbedSettings) -> None:
        self._processes, self._settings = processes, settings
        self._held = dict.fromkeys(processes, 0)
        self._failure: UserError | None = None
        self._ended = False

    def run(self, chunks: Iterator[Chunk], on_ready: Callable[[], None], on_batch: OnBatch) -> Iterator[Part]:
        """Embed chunks; see `embed_in_processes`."""
        opened = False
        while not self._ended or any(self._held.values()):
            for ready in wait(list(self._processes)):
                assert isinstance(ready, Connection)
                kind, content = self._receive(ready)
                if kind == "batch":
                    on_batch(*content)
                elif kind == "done":
                    self._held[ready] -= 1
                    yield content
                elif not opened:
                    opened = True
                    on_ready()
                # The second chunk, to be encoded while the first one runs, comes only when that one runs: the
                # last chunks are shared evenly.
                if self._held[ready] < (2 if kind == "batch" else 1):
                    self._give(ready, chunks)
            interrupts.raise_if_interrupted()
        if self._failure is not None:
            raise self._failure

    def _give(self, connection: Connection, chunks: Iterator[Chunk]) -> None:
        """Give the next chunk to a process, if there is one."""
        try:
            chunk = None if self._ended else next(chunks, None)
        except UserError as error:  # what was read before it is finished first
            chunk, self._failure = None, error
        if chunk is None:
            self._ended = True
            return
        self._held[connection] += 1
        self._send(connection, chunk)

    def _send(self, connection: Connection, chunk: Chunk) -> None:
        try:
            connection.send(chunk)
        except OSError:
            raise self._killed(connection) from None

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        try:
            kind, content = connection.recv()
        except (EOFError, OSError):
            raise self._killed(connection) from None
        if kind == "error":
            raise content
        if kind == "bug":
            raise RuntimeError(content)
        return kind, content

    def _killed(self, connection: Connection) -> UserError:
        process = self._processes[connection]
        process.join()
        code = process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        fewer = max(1, len(self._processes) // 2)
        return UserError(
            f"One of the {len(self._processes)} processes {how}.",
            "If the system ran out of memory, use fewer: "
            f"--processes {fewer} --threads {self._settings.threads}. What is finished is kept.",
        )


def _work(connection: Connection, settings: EmbedSettings, parts: Parts) -> None:
    """Embed the chunks that the parent process sends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    end_with_parent()
    # The tokenizer's own threads, which would otherwise be one per core in each process.
    os.environ["RAYON_NUM_THREADS"] = str(settings.threads)
    try:
        embedder = Embedder(settings, lambda *counts: connection.send(("batch", counts)))
        connection.send(("open", None))
        for embedded in embedder.chunks(iter(connection.recv, None)):  # until the parent ends this process
            connection.send(("done", parts.write(embedded)))
    except UserError as error:
        connection.send(("error", error))
    except Exception:  # a bug in this package, which the parent reports with the traceback
        connection.send(("bug", traceback.format_exc()))
