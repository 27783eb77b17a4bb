"""Write the tables of docs/quality.md from the committed results.

    python benchmarks/quality_page.py

Only what stands between the markers of a table is replaced; a test holds that nothing is left to replace.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "quality.md"
RESULTS = REPOSITORY / "benchmarks" / "results"


NOT_MEASURED = ["Not measured yet."]


def page(text: str, shipped: list[dict[str, Any]], quality: dict[str, Any] | None) -> str:
    """The page with its tables made anew."""
    tables = {
        "shipped": [line for result in shipped for line in _shipped_table(result)],
        "pretraining": _pretraining_table(quality["pretraining"]) if quality else NOT_MEASURED,
        "tasks": _tasks_table(quality["tasks"]) if quality and quality["tasks"] else NOT_MEASURED,
    }
    for name, lines in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        block = "\n".join([begin, *lines, end])
        text, count = pattern.subn(lambda _, block=block: block, text)
        if count != 1:
            raise ValueError(f"docs/quality.md has no place for the table {name}")
    return text


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


def current() -> str:
    """The page as the committed results make it."""
    shipped = json.loads((RESULTS / "minilm-quality.json").read_text(encoding="utf-8"))
    path = RESULTS / "quality-cpu.json"
    quality = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return page(PAGE.read_text(encoding="utf-8"), shipped, quality)


if __name__ == "__main__":
    PAGE.write_text(current(), encoding="utf-8")
