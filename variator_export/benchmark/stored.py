"""Benchmarks that a bundle keeps: a measurement holds as long as the graph it timed is the same.

`reports/benchmark.json` is the latest run. Every run is also kept in `reports/benchmarks`: a short run at one
shape does not replace a long one at many, and a plugin that is added hides nothing.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from variator_export.benchmark.bundle_benchmark import Benchmark
from variator_export.benchmark.speed_table import break_even
from variator_export.benchmark.stored_form import is_run
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.reports import BENCHMARK_REPORT, BENCHMARKS, read_report, store_report
from variator_export.core.hashing import sha256_json

_KEYS = ("graphs", "shapes", "break_even", "conditions", "settings", "machine", "measured_at")


def store_benchmark(benchmark: Benchmark) -> Path:
    """Store a run in its bundle, next to earlier runs. Runs on another backbone are removed.

    Returns:
        The report of the latest run.

    Raises:
        UserError: The bundle cannot be written.
    """
    # Without a path of this machine.
    content = {key: value for key, value in benchmark.as_dict().items() if key != "bundle"}
    # A run that repeats another one replaces it.
    shapes = [[s["batch_size"], s["sequence_length"]] for s in content["shapes"]]
    timed = sorted({(row["runtime"], row["variant"]) for s in content["shapes"] for row in s["rows"]})
    key = sha256_json([_hardware(content["machine"]), content["settings"], shapes, timed])[:16]
    state = "The bundle was timed; the benchmark report is not stored."
    store_report(benchmark.bundle, f"{BENCHMARKS}/{key}.json", content, state)
    baseline = BundleFiles(benchmark.bundle).manifest.baseline.name
    for path, other in _runs(benchmark.bundle):
        if other["graphs"].get(baseline) != content["graphs"].get(baseline):
            path.unlink(missing_ok=True)
    return store_report(benchmark.bundle, BENCHMARK_REPORT, content, state)


def stored_benchmark(bundle: BundleFiles) -> dict[str, Any] | None:
    """What all runs on the latest run's hardware say of a bundle's graphs as they are now.

    Each runtime and variant is shown from the run with the most openings, and of those from the latest.

    Returns:
        A report as `Benchmark.as_dict` makes it, with the shapes of all runs; None if no run applies.
    """
    graphs, baseline = bundle.graph_hashes(), bundle.manifest.baseline.name
    runs = [
        run
        for run in (_latest(bundle.path), *(run for _, run in _runs(bundle.path)))
        if run is not None and run["graphs"].get(baseline) == graphs[baseline]
    ]
    if not runs:
        return None
    latest = max(runs, key=lambda run: str(run["measured_at"]))
    same = [run for run in runs if _hardware(run["machine"]) == _hardware(latest["machine"])]
    same.sort(key=lambda run: (run["settings"].get("openings", 1), str(run["measured_at"])), reverse=True)
    merged: dict[tuple[int, int], dict[str, Any]] = {}
    for run in same:
        for shape in run["shapes"]:
            _merge(merged, shape, {n for n, sha256 in run["graphs"].items() if graphs.get(n) == sha256})
    shapes = [merged[key] for key in sorted(merged, key=lambda key: (key[0] * key[1], key))]
    shown = [s for s in shapes if s["rows"]]
    if not shown:
        return None
    by_shape = [((s["batch_size"], s["sequence_length"]), s["rows"]) for s in shown]
    fewest = min(run["settings"].get("openings", 1) for run in same)
    return latest | {
        "shapes": shown,
        "break_even": break_even(by_shape),
        "settled": all(shape["settled"] for shape in shown),
        "settings": latest["settings"] | {"openings": fewest},
    }


def _merge(merged: dict[tuple[int, int], dict[str, Any]], shape: Mapping[str, Any], valid: set[str]) -> None:
    """Add a shape's rows, except those that a better run has or that timed another graph."""
    key = (shape["batch_size"], shape["sequence_length"])
    rows = [row for row in shape["rows"] if row["variant"] in valid]
    profiles = {name: rows for name, rows in shape["profiles"].items() if name in valid}
    if key not in merged:
        merged[key] = dict(shape) | {"rows": rows, "profiles": profiles}
        return
    known = merged[key]
    there = {(row["runtime"], row["variant"]) for row in known["rows"]}
    added = [row for row in rows if (row["runtime"], row["variant"]) not in there]
    known["rows"] = [*known["rows"], *added]
    known["profiles"] = profiles | known["profiles"]
    if added:
        known["settled"] = known["settled"] and shape["settled"]


def _hardware(machine: Mapping[str, Any]) -> list[Any]:
    return [machine.get("cpu"), machine.get("cpu_cores")]


def _latest(bundle: Path) -> dict[str, Any] | None:
    found = read_report(bundle, BENCHMARK_REPORT, *_KEYS)
    return found if found is not None and is_run(found) else None


def _runs(bundle: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the runs that can be read, with their files."""
    for path in sorted((bundle / BENCHMARKS).glob("*.json")):
        found = read_report(bundle, f"{BENCHMARKS}/{path.name}", *_KEYS)
        if found is not None and is_run(found):
            yield path, found
