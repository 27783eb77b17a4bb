"""The formats of the output: how the vectors of a chunk are stored, and how chunks become one file.

The payload of a chunk is in the format's own terms already, so that putting millions of texts together at the
end is little more than copying.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from variator_export.core.environment import require
from variator_export.core.errors import UsageError
from variator_export.serving.offline.source import Chunk

_COPY_BYTES = 1 << 20


class OutputFormat(ABC):
    """One format.

    Attributes:
        suffix: The suffix of files in this format.
        has_ids: Whether a file holds ids, and texts if wanted.
        distributions: The distributions that the format needs, and that decide the bytes of a file.
    """

    suffix: str
    has_ids = True
    distributions: tuple[str, ...] = ()

    @abstractmethod
    def payload(self, chunk: Chunk, vectors: np.ndarray, *, with_text: bool) -> bytes:
        """The bytes that store the vectors of a chunk, float32 (number of texts, hidden size)."""

    @abstractmethod
    def assemble(self, file: BinaryIO, payloads: Iterator[BinaryIO], shape: tuple[int, int]) -> None:
        """Write the output from the payloads of all chunks, in order.

        Args:
            file: The output.
            payloads: One file for each chunk, which stands at the start of its payload.
            shape: The number of texts and the hidden size.
        """


class Npy(OutputFormat):
    """One float32 array (number of texts, hidden size), which `numpy.load(mmap_mode="r")` maps."""

    suffix = ".npy"
    has_ids = False

    def payload(self, chunk: Chunk, vectors: np.ndarray, *, with_text: bool) -> bytes:
        """The numbers alone."""
        del chunk, with_text
        return vectors.astype("<f4", copy=False).tobytes()

    def assemble(self, file: BinaryIO, payloads: Iterator[BinaryIO], shape: tuple[int, int]) -> None:
        """The header that `numpy.save` writes, then the numbers."""
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        _copy(payloads, file)


class JsonLines(OutputFormat):
    """An object on each line: `id`, `text` if wanted, `embedding`."""

    suffix = ".jsonl"

    def payload(self, chunk: Chunk, vectors: np.ndarray, *, with_text: bool) -> bytes:
        """The lines. Nine digits are all that a float32 holds: reading them gives the same number."""
        numbers = ", ".join(["%.9g"] * vectors.shape[1])
        lines = []
        for place, vector in enumerate(vectors.tolist()):
            row: dict[str, Any] = {"id": chunk.ids[place]}
            if with_text:
                row["text"] = chunk.texts[place]
            start = json.dumps(row, ensure_ascii=False)[:-1]
            lines.append(f'{start}, "embedding": [{numbers % tuple(vector)}]}}\n')
        return "".join(lines).encode()

    def assemble(self, file: BinaryIO, payloads: Iterator[BinaryIO], shape: tuple[int, int]) -> None:
        """The lines of one chunk after those of another."""
        del shape
        _copy(payloads, file)


class Parquet(OutputFormat):
    """Columns `id`, `text` if wanted, and `embedding`: a list of float32 of fixed size."""

    suffix = ".parquet"
    distributions = ("pyarrow",)

    def payload(self, chunk: Chunk, vectors: np.ndarray, *, with_text: bool) -> bytes:
        """A table as an Arrow stream."""
        import pyarrow as pa

        columns = {
            "id": pa.array(chunk.ids, pa.string() if isinstance(chunk.ids[0], str) else pa.int64()),
            **({"text": pa.array(chunk.texts, pa.string())} if with_text else {}),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.ravel(), pa.float32()), vectors.shape[1]
            ),
        }
        table = pa.table(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return bytes(sink.getvalue())

    def assemble(self, file: BinaryIO, payloads: Iterator[BinaryIO], shape: tuple[int, int]) -> None:
        """A row group for each chunk."""
        import pyarrow as pa
        import pyarrow.parquet

        del shape
        writer: Any = None
        for payload in payloads:
            table = pa.ipc.open_stream(payload).read_all()
            if writer is None:
                # Vectors hardly repeat and hardly shrink.
                writer = pyarrow.parquet.ParquetWriter(
                    file, table.schema, use_dictionary=False, compression="none"
                )
            writer.write_table(table)
        writer.close()


def _copy(payloads: Iterator[BinaryIO], file: BinaryIO) -> None:
    for payload in payloads:
        shutil.copyfileobj(payload, file, _COPY_BYTES)


FORMATS: dict[str, OutputFormat] = {found.suffix: found for found in (Parquet(), Npy(), JsonLines())}


def find_format(output: Path) -> OutputFormat:
    """The format of an output, by its suffix.

    Raises:
        UserError: No format has the suffix, or the format needs a package that is not installed.
    """
    if output.suffix not in FORMATS:
        raise UsageError(
            f"The output {output} has the suffix {output.suffix or '(none)'}.",
            f"Give one of: {', '.join(FORMATS)}.",
        )
    found = FORMATS[output.suffix]
    for distribution in found.distributions:
        require(distribution, "parquet", f"Writing {output.suffix}")
    return found
