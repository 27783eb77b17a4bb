"""The finished chunks of a run: one file each, which is there whole or not at all."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from variator_export.bundle.publishing import writing_to
from variator_export.core.errors import UserError
from variator_export.serving.offline.embedder import Embedded
from variator_export.serving.offline.formats import FORMATS
from variator_export.serving.offline.source import Chunk

PATTERN = "*.part"
_LONGEST_HEADER = 4096
_STATE = "The finished texts stay there, and the same command goes on from them."


@dataclass(frozen=True)
class Part:
    """The first line of a part's file, as JSON; the payload follows.

    Attributes:
        job: The sha256 of the identity of the run.
        chunk: The sha256 of the chunk's texts and ids.
        texts: Number of texts.
        hidden_size: Numbers of a vector.
        tokens: Number of tokens of the texts.
        truncated: Number of texts that were truncated.
        payload_bytes: Length of the payload.
    """

    job: str
    chunk: str
    texts: int
    hidden_size: int
    tokens: int
    truncated: int
    payload_bytes: int


@dataclass(frozen=True)
class Parts:
    """The parts in a folder. Several processes may write into it.

    Attributes:
        folder: The folder.
        job: The sha256 of the identity of the run.
        suffix: The suffix of the output, which names the format of the payloads.
        with_text: Whether the output repeats the texts.
    """

    folder: Path
    job: str
    suffix: str
    with_text: bool

    def find(self, chunk: Chunk) -> Part | None:
        """The finished part of a chunk; None if there is none, or one of other texts."""
        path = self._path(chunk.index)
        try:
            with path.open("rb") as file:
                part = _read_header(file)
                whole = part.payload_bytes == path.stat().st_size - file.tell()
        except (OSError, ValueError, TypeError):
            return None
        return part if whole and (part.job, part.chunk) == (self.job, chunk.sha256) else None

    def write(self, embedded: Embedded) -> Part:
        """Write the part of a chunk.

        Raises:
            UserError: The folder cannot be written, or the disk is full.
        """
        chunk, vectors = embedded.chunk, embedded.vectors
        texts, hidden_size = vectors.shape
        payload = FORMATS[self.suffix].payload(chunk, vectors, with_text=self.with_text)
        part = Part(
            self.job,
            chunk.sha256,
            texts,
            hidden_size,
            embedded.tokens,
            embedded.truncated,
            len(payload),
        )
        header = json.dumps(dataclasses.asdict(part)).encode() + b"\n"
        with writing_to(self.folder, _STATE), whole_file(self._path(chunk.index)) as file:
            file.write(header)
            file.write(payload)
        return part

    def assemble(self, count: int, shape: tuple[int, int], path: Path) -> None:
        """Put the first `count` parts together, in order, in constant memory.

        Args:
            count: Number of parts.
            shape: The number of texts and the hidden size.
            path: The file to write.

        Raises:
            UserError: The file cannot be written, or the disk is full.
        """
        with writing_to(self.folder, _STATE), whole_file(path) as file:
            FORMATS[self.suffix].assemble(file, self._payloads(count), shape)

    def _payloads(self, count: int) -> Iterator[BinaryIO]:
        for index in range(count):
            with self._path(index).open("rb") as file:
                if _read_header(file).job != self.job:
                    raise UserError(
                        f"{self._path(index)} changed during the run.", "Run the same command again."
                    )
                yield file

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:08}.part"


def _read_header(file: BinaryIO) -> Part:
    return Part(**json.loads(file.readline(_LONGEST_HEADER)))


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name. It gets its own once all bytes are on the disk."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
