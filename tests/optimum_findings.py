"""Judges what open_in_optimum.py wrote: every call against eager PyTorch and against our own session."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from variator_export import Bundle
from variator_export.bundle.manifest import Variant
from variator_export.engines.base import Arrays
from variator_export.verification.cases import Case
from variator_export.verification.judging.compare import deviation
from variator_export.verification.judging.error_budget import MULTIPLE, Budget
from variator_export.verification.reference import load_reference

# Only the class for custom tasks gives it.
SENTENCE_EMBEDDING = "sentence_embedding"
# In every case of the stored reference.
EVERY_CASE = ("default", "io_binding", "numpy", "same_optimizers")
CUSTOM = "custom_tasks"
WAYS = (*EVERY_CASE, "tokenizer", "pipeline", "saved_with_plugins")
# Optimum puts all external data beside the saved graph, where a graph that points into plugins/ misses it.
MAY_FAIL = ("saved",)
SESSION, EAGER = "our session", "eager PyTorch"

Call = dict[str, Arrays]


def judge_variant(
    bundle: Bundle, variant: Variant, outputs: Path, printed: Mapping[str, Any], failed: Mapping[str, str]
) -> dict[str, Any]:
    """What one graph gave in every way that it was opened.

    Args:
        bundle: The bundle that was opened.
        variant: Which of its graphs.
        outputs: The tensors of every call.
        printed: What was printed, by way.
        failed: What was raised, by way.

    Returns:
        The largest differences by way, and the problems: none if all is well.
    """
    judge = _Judge(bundle, variant)
    calls = read_calls(outputs)
    required = [*WAYS, *([CUSTOM] if SENTENCE_EMBEDDING in judge.outputs else [])]
    problems = [f"{way}: {error}" for way, error in failed.items() if way not in MAY_FAIL]
    problems += [f"{way}: it printed: {' '.join(printed[way])}" for way in printed if way not in failed]
    problems += [f"{way}: nothing was run" for way in required if way not in calls and way not in failed]
    ways = {way: judge.way(way, cases) for way, cases in calls.items()}
    return {
        "variant": variant.name,
        "ratio": variant.ratio,
        "file": variant.graph,
        "ways": ways,
        "may_fail": {way: failed.get(way, "opens") for way in MAY_FAIL},
        "problems": problems + judge.problems,
    }


class _Judge:
    """Compares the calls of one graph."""

    def __init__(self, bundle: Bundle, variant: Variant) -> None:
        self.outputs = bundle.manifest.backbone.outputs
        self.problems: list[str] = []
        self._reference = {e.case.name: e for e in load_reference(bundle.file(variant.reference))}
        self._session = bundle.session(variant=variant.name)
        budgets = [expected.budgets for expected in self._reference.values()]
        # What a pipeline gives the model is not stored, so nobody knows how much it amplifies rounding.
        self._widest = {name: _widest([budget[name] for budget in budgets]) for name in self.outputs}

    def way(self, way: str, cases: Mapping[str, Call]) -> dict[str, Any]:
        """Compare every call of one way; the largest differences."""
        if way in EVERY_CASE:
            self.problems += [
                f"{way}, {case}: it was not run" for case in self._reference if case not in cases
            ]
        found: dict[str, list[float]] = {SESSION: [], EAGER: [], "used": []}
        for case, call in cases.items():
            for name in self.outputs:
                if name != SENTENCE_EMBEDDING or way == CUSTOM:
                    self._output(f"{way}, {case}", case, call, name, found)
        return {
            "calls": len(cases),
            "max_abs_to_session": _largest(found[SESSION]),
            "max_abs_to_eager": _largest(found[EAGER]),
            "used": _largest(found["used"]),
        }

    def _output(self, what: str, case: str, call: Call, name: str, found: dict[str, list[float]]) -> None:
        """Compare one output of one call with our session, and with eager PyTorch where that is stored."""
        inputs, known = call["inputs"], self._reference.get(case)
        if known is not None and not _equal(inputs, known.case.inputs):
            self.problems.append(f"{what}: the inputs are not those of the stored reference")
            return
        if name not in call["outputs"]:
            self.problems.append(f"{what}: no output {name}")
            return
        expected = {SESSION: self._session.run(inputs)[name]}
        if known is not None:
            expected[EAGER] = known.outputs[name]
        budget = known.budgets[name] if known is not None else self._widest[name]
        for against, values in expected.items():
            rows = Case(case, inputs).judged_rows
            difference, multiple, problem = _compare(call["outputs"][name], values, rows, budget)
            found[against].append(difference)
            found["used"].append(multiple)
            if problem:
                self.problems.append(f"{what}, {name}, against {against}: {problem}")


def read_calls(path: Path) -> dict[str, dict[str, Call]]:
    """The calls by way and case; none if there is no file."""
    calls: dict[str, dict[str, Call]] = {}
    for key, array in load_file(path).items() if path.exists() else ():
        way, case, part, name = key.split("/")
        calls.setdefault(way, {}).setdefault(case, {"inputs": {}, "outputs": {}})[part][name] = array
    return calls


def _largest(values: Sequence[float]) -> float | None:
    """None where nothing could be compared, which JSON has no number for."""
    largest = max(values, default=math.inf)
    return None if math.isinf(largest) else float(f"{largest:.3g}")


def _equal(found: Arrays, expected: Arrays) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[k], expected[k]) for k in expected)


def _widest(budgets: Sequence[Budget]) -> Budget:
    return Budget(*(max(values) for values in zip(*map(astuple, budgets), strict=True)))


def _compare(
    found: np.ndarray, expected: np.ndarray, rows: np.ndarray, budget: Budget
) -> tuple[float, float, str | None]:
    """The largest difference, the multiple of eager's own rounding, and what is wrong with it."""
    if found.shape != expected.shape:
        return math.inf, math.inf, f"the shape is {found.shape}, not {expected.shape}"
    if not np.isfinite(found).all():
        return math.inf, math.inf, "NaN or infinite values"
    far = deviation(found[rows], expected[rows])
    multiple = budget.used(far)
    if budget.allows(far):
        return far.max_abs, multiple, None
    return (
        far.max_abs,
        multiple,
        f"{far}: {multiple:.3g} times the rounding of eager, {MULTIPLE:g} are allowed",
    )


def table(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The largest differences by task and ratio over all models; Optimum's default options."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for result in results:
        for variant in result["variants"]:
            way = variant["ways"].get("default", {})
            row = rows.setdefault(
                (result["task"], variant["ratio"]),
                {"task": result["task"], "class": result["class"], "ratio": variant["ratio"], "models": []},
            )
            row["models"].append(result["name"])
            for key in ("max_abs_to_session", "max_abs_to_eager", "used"):
                row[key] = max(row.get(key) or 0.0, way.get(key) or 0.0)
            same = variant["ways"].get("same_optimizers", {}).get("max_abs_to_session")
            row["same_optimizers"] = max(row.get("same_optimizers") or 0.0, same or 0.0)
    return list(rows.values())
