"""Files of `variator-export run`: texts in, results out."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from variator_export.core.environment import require
from variator_export.core.errors import UserError

SUFFIXES = (".npy", ".jsonl", ".parquet")


def read_texts(
    source: str, text_column: str, pair_column: str | None, header: bool
) -> tuple[list[str], list[str] | None]:
    """Read texts, or pairs of texts, from a file or from standard input.

    Args:
        source: A .txt file with one text on each line, a .tsv, .csv or .jsonl file, or `-` for lines from
            standard input.
        text_column: The column of the text, in a table.
        pair_column: The column of the second text, in a table. None if there is none.
        header: Whether the first line of a table names its columns.

    Raises:
        UserError: The file cannot be read, holds no text, or is not UTF-8.
    """
    if source != "-" and Path(source).suffix != ".txt":
        from variator_export.data.example_files import read_examples
        from variator_export.data.examples import Columns

        examples = read_examples(source, Columns(text_column, pair_column, None, header))
        return list(examples.texts), None if examples.pairs is None else list(examples.pairs)
    from variator_export.data.lines import read_lines, split_lines

    if source == "-":
        return split_lines(sys.stdin.buffer.read(), "Standard input"), None
    return read_lines(Path(source)), None


def write_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write results to a file; the suffix names its format.

    Args:
        path: `.npy` for one array (number of texts, …), in the order of the texts; `.jsonl` or `.parquet` for
            a row for each text.
        results: The text, the prediction and the outputs of each row.

    Raises:
        UserError: The file cannot be written, or the format needs a package that is not installed.
    """
    if path.suffix == ".parquet":
        require("pyarrow", "parquet", "Writing Parquet")
    try:
        if path.suffix == ".npy":
            np.save(path, np.stack([next(iter(result["outputs"].values())) for result in results]))
        elif path.suffix == ".jsonl":
            with path.open("w", encoding="utf-8") as file:
                for result in results:
                    flat = {k: v for k, v in result.items() if k != "outputs"} | numbers(result["outputs"])
                    file.write(json.dumps(flat, ensure_ascii=False, allow_nan=False) + "\n")
        else:
            import pyarrow as pa
            import pyarrow.parquet

            flat_rows = [
                {k: v for k, v in result.items() if k != "outputs"}
                | {name: values.tolist() for name, values in result["outputs"].items()}
                for result in results
            ]
            pyarrow.parquet.write_table(pa.Table.from_pylist(flat_rows), path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}.",
            "Choose a folder that exists and has space.",
        ) from error


def numbers(outputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Outputs as nested lists, with null for NaN and infinity, which JSON does not have."""
    return {name: _numbers(values) for name, values in outputs.items()}


def _numbers(values: np.ndarray) -> Any:
    if np.isfinite(values).all():
        return values.tolist()
    found = values.astype(object)
    found[~np.isfinite(values)] = None
    return found.tolist()
