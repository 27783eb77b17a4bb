"""What the averages of correct graphs are, and which small faults the averages show (docs/verification.md).

    python tests/check_averages.py --output benchmarks/results/averages.json

Builds a bundle of every small model of conftest.py and of MiniLM, at ratios 1, 2 and 4, verifies each graph
as `build` does, and each output again with every value off by 1e-7, 3e-7 and 1e-6. Takes ten minutes on two
cores. Exit code 1 if a correct graph is outside a limit.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import MINILM, MODELS, copy_tokenizer

from variator_export import Bundle
from variator_export.building.recipe_build import build
from variator_export.core.environment import GRAPH_DISTRIBUTIONS, machine, versions
from variator_export.core.json_file import write_json
from variator_export.core.progress import Progress
from variator_export.engines.base import Arrays, Runner
from variator_export.model.backbone import quiet_transformers
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe import Recipe
from variator_export.verification.eager_bundle import EagerBundle
from variator_export.verification.judging.averages import AVERAGE, BIAS
from variator_export.verification.judging.expected import Expected
from variator_export.verification.judging.judge import REFERENCE
from variator_export.verification.reference_check import verify_graph
from variator_export.verification.runs import Graphs

RATIOS = (2, 4)
BIASES = (1e-7, 3e-7, 1e-6)


class _Biased:
    """A runner whose values are all off by a number."""

    def __init__(self, runner: Runner, bias: float) -> None:
        self._runner, self._bias = runner, np.float32(bias)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the graph, and add the bias."""
        return {name: values + self._bias for name, values in self._runner.run(inputs).items()}


def main() -> int:
    """Do everything; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as work:
        rows = [
            row
            for name in ("minilm", *MODELS)
            for row in measure(name, build_bundle(name, Path(work), options.precision))
        ]
    write_json(
        options.output,
        {
            "question": "How far are correct graphs from eager PyTorch on average? Which biases are seen?",
            "machine": machine(),
            "versions": versions("variator-export", *GRAPH_DISTRIBUTIONS, "onnxruntime"),
            "precision": options.precision,
            "summary": summary(rows),
            "rows": rows,
        },
    )
    print(json.dumps(summary(rows), indent=2))
    return int(any(row["failed"] for row in rows if not row["bias added"]))


def build_bundle(name: str, work: Path, precision: str) -> Path:
    """A bundle of ratios 1, 2 and 4."""
    print(name, file=sys.stderr, flush=True)
    source = MINILM
    if name != "minilm":
        source = str(work / name)
        torch.manual_seed(0)
        with quiet_transformers():
            MODELS[name](2).save_pretrained(source)
        copy_tokenizer(resolve_source(MINILM).folder, Path(source))
    recipe = {
        "name": name,
        "backbone": {"source": source},
        "precision": precision,
        "plugins": [{"ratio": k, "initialise": {"seed": k}} for k in RATIOS],
        "targets": ["onnxruntime"],
        "speed": None,
    }
    return build(Recipe.model_validate(recipe), work / f"{name}.bundle").bundle


def measure(name: str, folder: Path) -> list[dict[str, Any]]:
    """The averages of every output of every variant, as it is and with biases."""
    bundle = Bundle.load(folder)
    eager, graphs, rows = EagerBundle(bundle, None, ()), Graphs(bundle), []
    for variant in bundle.manifest.variants:
        reference = eager.reference(variant, Progress())
        runner = graphs.runners(variant)[variant.graph]
        for bias in (0.0, *BIASES):
            rows += judged(name, variant.name, bias, runner, reference)
    return rows


def judged(
    name: str, variant: str, bias: float, runner: Runner, reference: Sequence[Expected]
) -> list[dict[str, Any]]:
    """A row for each output."""
    findings = verify_graph(variant, _Biased(runner, bias) if bias else runner, reference)
    rows = []
    for output in dict.fromkeys(f.question.output for f in findings):
        own = [f for f in findings if f.question.output == output]
        averages = {f.question.check: f for f in own if f.question.check in (AVERAGE, BIAS)}
        cases = [f for f in own if f.question.check == REFERENCE]
        rows.append(
            {
                "model": name,
                "variant": variant,
                "output": output,
                "bias added": bias,
                "cases": len(cases),
                "worst case": max(f.used or 0.0 for f in cases),
                **{check: f.used for check, f in averages.items()},
                **{f"{check}, allowed": f.allowed for check, f in averages.items()},
                "failed": sorted({f.question.check for f in own if not f.passed}),
            }
        )
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest averages of correct graphs, and how many outputs each bias was seen in, and by what."""
    correct = [row for row in rows if not row["bias added"]]
    found = {
        check: max(row[check] for row in correct if row.get(check) is not None) for check in (AVERAGE, BIAS)
    }
    seen = {}
    for bias in BIASES:
        of_bias = [row for row in rows if row["bias added"] == bias]
        seen[f"{bias:g}"] = {
            "outputs": len(of_bias),
            "seen": sum(bool(row["failed"]) for row in of_bias),
            "seen in a case alone": sum(REFERENCE in row["failed"] for row in of_bias),
        }
    return {
        "correct outputs": len(correct),
        "failed": sum(bool(row["failed"]) for row in correct),
        "worst case": max(row["worst case"] for row in correct),
        **found,
        "biases": seen,
    }


if __name__ == "__main__":
    sys.exit(main())
