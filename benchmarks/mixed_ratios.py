"""Search with queries at one ratio in an index made at another: how many of the ten nearest stay.

    python benchmarks/mixed_ratios.py --bundle artifacts/minilm --data ../shared/data/STS-B/dev.tsv \\
        --output benchmarks/results/mixed-ratios.json

The second sentences of the file are the index and the first ones the queries. What is found with both at
ratio 1 is what should be found.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from common import describe, write_result
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.sessions import Bundle

_NEAREST = 10


def nearest(queries: np.ndarray, index: np.ndarray) -> list[set[int]]:
    """The nearest rows of an index for each query, by cosine."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, index)]
    found = np.argpartition(-(unit[0] @ unit[1].T), _NEAREST, axis=1)[:, :_NEAREST]
    return [set(row.tolist()) for row in found]


def kept(expected: list[set[int]], found: list[set[int]]) -> float:
    """The mean share of the nearest rows that were found."""
    return float(np.mean([len(one & other) / _NEAREST for one, other in zip(expected, found, strict=True)]))


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle)
    examples = read_examples(str(options.data), Columns("sentence1", "sentence2", None))
    queries = sorted(set(examples.texts))
    index = sorted(set(examples.pairs or ()))
    vectors = {
        v.ratio: (bundle.embed(queries, v.ratio), bundle.embed(index, v.ratio))
        for v in bundle.manifest.variants
    }
    expected = nearest(*vectors[1])
    rows: list[dict[str, Any]] = [
        {"queries": k, "index": other, "kept": kept(expected, nearest(vectors[k][0], vectors[other][1]))}
        for k in vectors
        for other in sorted({1, k})
    ]
    result = {"num_queries": len(queries), "num_index": len(index), "nearest": _NEAREST, "rows": rows}
    write_result(options.output, describe() | result)


if __name__ == "__main__":
    main()
