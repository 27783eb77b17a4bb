"""Write the tables of the documentation from the committed results.

    python benchmarks/pages.py

Only what stands between the markers of a table is replaced; a test holds that nothing is left to replace.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from curve_plot import measured_tasks, points

# Runtimes that run a bundle's graphs.
OWN = ("onnxruntime", "openvino")
PRECISIONS = ("float32", "int8")
REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
QUALITY = REPOSITORY / "docs" / "quality.md"
PERFORMANCE = REPOSITORY / "docs" / "performance.md"
SESSIONS = REPOSITORY / "docs" / "sessions.md"
CPU = REPOSITORY / "docs" / "cpu.md"
MODULAR = REPOSITORY / "docs" / "modular.md"


def current() -> dict[Path, str]:
    """The pages as the committed results make them."""
    quality, sessions = _result("quality-cpu"), _result("sessions-cpu")["results"]
    return {
        QUALITY: _with_tables(
            QUALITY,
            {
                "shipped": [line for result in _result("minilm-quality") for line in _shipped_table(result)],
                "pretraining": _pretraining_table(quality["pretraining"]),
                "tasks": _tasks_table(quality["tasks"]),
                "curve": _curve_table(_result("curve-cpu")),
            },
        ),
        PERFORMANCE: _with_tables(
            PERFORMANCE,
            {"speed": _speed_table({"MiniLM": _result("bench-minilm"), "T5-base": _result("bench-t5-base")})},
        ),
        CPU: _with_tables(
            CPU,
            {
                "cpu": _cpu_table(_result("cpu-minilm")),
                "cpu-vnni": _cpu_table(_result("cpu-minilm-vnni")),
                "cpu-sst2": _cpu_table(_result("cpu-sst2")),
            },
        ),
        MODULAR: _with_tables(
            MODULAR,
            {
                "assemblies": _assemblies_table(_result("modular-cpu")),
                "one-session": _one_session_table(_result("modular-cpu")),
                "text-demo": _text_demo_table(_result("modular-text-cpu")["demo"]),
                "text-base": _text_base_table(_result("modular-text-cpu")["t5-base"]),
            },
        ),
        SESSIONS: _with_tables(
            SESSIONS, {"sessions": _sessions_table(sessions), "memory": _memory_table(sessions)}
        ),
    }


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _with_tables(path: Path, tables: Mapping[str, Sequence[str]]) -> str:
    text = path.read_text(encoding="utf-8")
    for name, lines in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        block = "\n".join([begin, *lines, end])
        text, count = pattern.subn(lambda _, block=block: block, text)
        if count != 1:
            raise ValueError(f"{path} has no place for the table {name}")
    return text


def _speed_table(results: Mapping[str, Any]) -> list[str]:
    """Ratio 4, ratio 1, and what others make of the model."""
    rows = []
    for model, result in results.items():
        for shape in result["shapes"]:
            row = {(r["runtime"], r["ratio"]): r for r in shape["rows"]}
            compressed, plain = row["onnxruntime", 4], row["onnxruntime", 1]
            others = row["torch.onnx", 1], row["onnxruntime-optimizer", 1]
            openings = compressed["speedup_of_openings"]
            rows.append(
                [
                    model,
                    f"({shape['batch_size']}, {shape['sequence_length']})",
                    *(f"{found['median_ms']:.1f}" for found in (*others, plain, compressed)),
                    f"{compressed['speedup']:.2f}x",
                    f"{compressed['speedup_low']:.2f} to {compressed['speedup_high']:.2f}",
                    f"{min(openings):.2f} to {max(openings):.2f}",
                    f"{compressed['speedup_allowed']:.2f}x",
                    f"{compressed['share_of_allowed']:.0%}",
                ]
            )
    times = ("torch.onnx ms", "optimizer ms", "k=1 ms", "k=4 ms")
    found = ("speed-up", "95 % interval", "of openings", "MACs allow", "reached")
    return _table(["model", "shape", *times, *found], rows)


def _sessions_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for result in results:
        for shape in result["shapes"]:
            found = [shape["null_plugin_over_ratio_1"], *shape["any_over_bound"].values()]
            cells = [_interval(entry) for entry in (*found, shape["changing_over_staying"])]
            rows.append([result["model"], f"({shape['batch_size']}, {shape['sequence_length']})", *cells])
    ratios = [f"k={k}" for k in results[0]["shapes"][0]["any_over_bound"]]
    return _table(["model", "shape", "k=1", *ratios, "changing"], rows)


def _cpu_table(result: Mapping[str, Any]) -> list[str]:
    """Quality, and milliseconds with the speed-up over float32 at ratio 1, of every subject."""
    rows = result["rows"]
    shapes = [f"({s['batch_size']}, {s['sequence_length']})" for s in rows[0]["shapes"]]
    return _table(
        ["what runs", "precision", "k", result["metric"], "lost", *shapes],
        (
            [
                f"{'this package, ' if row['runtime'] in OWN else ''}{row['runtime']}",
                row["precision"],
                row["variant"].removeprefix("ratio-"),
                f"{row['quality']:.4f}",
                f"{row['lost']:.2%}",
                *(f"{s['median_ms']:.1f} ms, {s['speedup']:.2f}x" for s in row["shapes"]),
            ]
            for row in rows
        ),
    )


def _assemblies_table(result: Mapping[str, Any]) -> list[str]:
    """Each variant in float32: what it loses, and its speed-up at every shape, from the best quality down."""
    found = result["precisions"]["float32"]
    shapes = found["speed"]
    rows = []
    for name, quality in found["quality"].items():
        low, high = quality["lost_interval"] or (0.0, 0.0)
        lost = f"{quality['lost']:.2%} ({low:.2%} to {high:.2%})"
        gained = [shapes[shape][name] for shape in shapes]
        rows.append(
            [
                f"`{name}`",
                f"{quality['metrics']['spearman']:.4f}",
                lost if quality["lost_interval"] else "",
                f"{quality['metrics']['cosine']:.3f}",
                *(f"{row['speedup']['value']:.2f}x" for row in gained),
                f"{gained[-1]['allowed']:.2f}x",
            ]
        )
    at = [f"({shape.replace('x', ', ')})" for shape in shapes]
    return _table(["variant", "Spearman", "lost", "cosine", *at, f"MACs allow at {at[-1]}"], rows)


def _curve_table(result: Mapping[str, Any]) -> list[str]:
    """What each model loses on each task, from the slowest to the fastest, in float32 and in int8."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    tasks = measured_tasks(result)
    for task in tasks:
        for point in points(result, task):
            row = rows.setdefault((point.kind, point.variant), {})
            row[task, point.precision] = f"{point.lost:.1%}"
            row[point.precision] = point.speedup
    ordered = sorted(rows.items(), key=lambda item: (item[1]["float32"], item[0]))
    return _table(
        [
            "model",
            "kind",
            *(f"speed-up, {p}" for p in PRECISIONS),
            *tasks,
            *(f"{t}, int8" for t in tasks),
        ],
        (
            [
                f"`{variant}`",
                kind,
                *(f"{row[precision]:.2f}x" for precision in PRECISIONS),
                *(row.get((task, precision), "") for precision in PRECISIONS for task in tasks),
            ]
            for (kind, variant), row in ordered
        ),
    )


def _text_demo_table(result: Mapping[str, Any]) -> list[str]:
    """Exact match of the demo's assemblies, and the speed-up of whole requests at each shape."""
    shapes = {
        shape: {row["variant"]: row for row in rows if row["runtime"] == "onnxruntime"}
        for shape, rows in result["speed"].items()
    }
    variants = [(name, quality["metrics"]["exact_match"]) for name, quality in result["quality"].items()]
    found = next(iter(shapes.values()))
    variants.sort(key=lambda entry: found[entry[0]]["speedup"] or 1.0)
    rows = [
        [
            f"`{name}`",
            f"{match:.1%}",
            *(
                f"{row['speedup']:.2f}x of {row['speedup_allowed']:.2f}x" if row["speedup"] else "1.00x"
                for row in (shapes[shape][name] for shape in shapes)
            ),
        ]
        for name, match in variants
    ]
    return _table(["variant", "exact match", *shapes], rows)


def _text_base_table(result: Mapping[str, Any]) -> list[str]:
    """The speed-up of whole requests of a T5-base, for each assembly and shape."""
    shapes = {"{}x{} tokens in, {} out".format(*shape.split("x")): found for shape, found in result.items()}
    specs = next(iter(shapes.values()))
    rows = [
        [f"`{spec}`", *(f"{found[spec]['speedup']['value']:.2f}x" for found in shapes.values())]
        for spec in specs
    ]
    return _table(["assembly", *shapes], rows)


def _one_session_table(result: Mapping[str, Any]) -> list[str]:
    """The graph of all assemblies over each own graph, a change of the assembly, and memory."""
    found = result["precisions"]["float32"]
    memory = {name: entry["anonymous_bytes"] / 1e6 for name, entry in found["memory"].items()}
    base = memory["without_a_session"]
    rows = [
        [
            f"({shape.replace('x', ', ')})",
            *(_interval(entry["shared_over_own"][name]) for name in entry["shared_over_own"]),
            _interval(entry["changing_over_staying"]),
            f"{entry['change_ms']:.2f} ms" if entry["change_ms"] > 0 else "within noise",
        ]
        for shape, entry in found["one_session"].items()
    ]
    names = next(iter(found["one_session"].values()))["shared_over_own"]
    table = _table(["shape", *(f"`{name}`" for name in names), "changing over staying", "a change"], rows)
    words = {
        "the_original_alone": "the original alone",
        "one_session_for_all_assemblies": "one session for all assemblies",
        "one_session_for_each_assembly": "one session for each assembly",
    }
    held = _table(
        ["memory of a process's own", "MB more than without a session"],
        [[text, f"{memory[name] - base:.0f}"] for name, text in words.items()],
    )
    return [*table, "", *held]


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _memory_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for result in results:
        memory = result["memory"]
        base = memory["without_a_session"]["resident_bytes"]
        kinds = ("one_session_for_all", "one_session_for_each", "ratio_1_only")
        taken = [f"{(memory[kind]['resident_bytes'] - base) / 1e6:.0f} MB" for kind in kinds]
        rows.append([result["model"], *taken, f"{memory['each_over_all']:.1f}x"])
    return _table(["model", "one for all", "one for each", "ratio 1 alone", "each over all"], rows)


def _shipped_table(shipped: dict[str, Any]) -> list[str]:
    rows = [row for row in shipped["rows"] if row["runtime"] == "onnxruntime"]
    data = shipped["data"]
    title = f"`{data['name']}`, {data['examples']} pairs (sha256 `{data['sha256'][:16]}…`):"
    table = _table(
        ["ratio", "Spearman", "lost", "cosine", "5th percentile", "recall@10"],
        (
            [
                str(row["ratio"]),
                f"{row['metrics']['spearman']:.4f}",
                f"{row['relative_loss']:.2%}",
                *(f"{row['metrics'][name]:.3f}" for name in ("cosine", "cosine_p5", "recall_at_10")),
            ]
            for row in rows
        ),
    )
    return [title, "", *table, ""]


def _pretraining_table(results: dict[str, Any]) -> list[str]:
    ratios = [k for k in next(iter(results.values()))["ratios"] if k != "1"]
    header = ["setting", *(f"cosine k={k}" for k in ratios), *(f"lost k={k}" for k in ratios)]
    return _table(
        header,
        (
            [
                name,
                *(f"{result['ratios'][k]['cosine']:.3f}" for k in ratios),
                *(f"{result['ratios'][k]['lost']:.1%}" for k in ratios),
            ]
            for name, result in results.items()
        ),
    )


def _tasks_table(tasks: dict[str, Any]) -> list[str]:
    rows = []
    for name, task in tasks.items():
        for way, ratios in task["ways"].items():
            rows.append([name, way, *(f"{result['accuracy']:.4f}" for result in ratios.values())])
    ratios = [f"k={k}" for k in next(iter(next(iter(tasks.values()))["ways"].values()))]
    return _table(["task", "plugins", *ratios], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


if __name__ == "__main__":
    for page, content in current().items():
        page.write_text(content, encoding="utf-8")
