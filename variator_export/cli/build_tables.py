"""Tables that a build prints."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from variator_export.building.parallel import Outcome
from variator_export.building.recipe_build import BuildResult
from variator_export.core.precision import find_precision
from variator_export.verification.judging.error_budget import GIVEN_MULTIPLE, MULTIPLE


def outcomes_table(outcomes: Sequence[Outcome]) -> Table:
    """Return a table with one row per recipe."""
    table = Table()
    for name in ("recipe", "state", "bundle"):
        table.add_column(name)
    for name in ("ratios", "x rounding", "speed-up"):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        result = outcome.result
        if result is None:
            table.add_row(outcome.name, outcome.state, str(outcome.bundle), "", "", "")
            continue
        worst = max((f["used"] for f in result.verification.values() if f is not None), default=None)
        rows = [r for r in (result.speed or {}).get("rows", ()) if r["runtime"] == "onnxruntime"]
        table.add_row(
            outcome.name,
            outcome.state,
            str(outcome.bundle),
            ", ".join(sorted({str(ratio) for ratio in result.ratios}, key=int)),
            "" if worst is None else f"{worst:.2f}",
            ", ".join(f"{row['speedup']:.2f}x" for row in rows if not row["is_baseline"])
            + ("" if result.speed is None or result.speed["settled"] else " (not settled)"),
        )
    return table


def verification_table(result: BuildResult) -> Table:
    quantizes = find_precision(result.precision).quantizes
    same = ", with the same rounded values" if quantizes else ""
    table = Table(
        title=f"Verified against eager PyTorch in float64{same}; "
        f"allowed: at most {GIVEN_MULTIPLE if quantizes else MULTIPLE:g} times its own rounding error in "
        f"{find_precision(result.precision).dtype}",
        title_justify="left",
    )
    for name in ("variant", "graph", "case", "output"):
        table.add_column(name)
    for name in ("max abs", "rel. Frobenius", "x rounding"):
        table.add_column(name, justify="right")
    for variant, found in result.verification.items():
        if found is None:
            table.add_row(variant, "report missing", *[""] * 5)
            continue
        table.add_row(
            variant,
            found["graph"],
            found["case"],
            found["output"],
            f"{found['max_abs']:.1e}",
            f"{found['relative_frobenius']:.1e}",
            f"{found['used']:.2f}",
        )
    return table


def losses_table(result: BuildResult) -> Table:
    """Return a table of what quantisation changes, by variant and output."""
    table = Table(
        title=f"{result.precision} against float32 at the same ratio, on the recipe's texts",
        title_justify="left",
    )
    for name in ("variant", "output"):
        table.add_column(name)
    for name in ("vectors", "mean cosine", "least cosine", "same class", "limit"):
        table.add_column(name, justify="right")
    for loss in (loss for losses in result.losses.values() for loss in losses):
        agreement = "" if loss["agreement"] is None else f"{loss['agreement']:.1%}"
        table.add_row(
            loss["variant"],
            loss["output"],
            str(loss["count"]),
            f"{loss['cosine']:.4f}",
            f"{loss['least_cosine']:.4f}",
            agreement,
            f"{loss['limit']:g}",
        )
    return table


def speed_table(speed: Any) -> Table:
    """Return a table of eager and exported speeds by ratio, with the speed-ups that saved MACs allow."""
    shape = f"batch {speed['batch_size']}, {speed['sequence_length']} tokens"
    title = (
        f"Speed at {shape}, medians of {speed['rounds']} alternating rounds on {speed['machine']['cpu']}, "
        f"{speed['machine']['cpu_cores']} cores; eager is PyTorch with SDPA; `bench` times several openings"
        + ("" if speed["settled"] else "; NOT SETTLED")
    )
    table = Table(title=title, title_justify="left")
    table.add_column("runtime")
    table.add_column("variant")
    for name in (
        "ms",
        "speed-up",
        f"over {speed['rounds']} rounds",
        "MACs allow",
        "reached",
        "over eager k=1",
        "MACs",
        "on graph",
    ):
        table.add_column(name, justify="right")
    for row in speed["rows"]:
        first = row["is_baseline"]
        table.add_row(
            row["runtime"],
            row["variant"],
            f"{row['median_ms']:.1f}",
            "" if first else f"{row['speedup']:.2f}x",
            "" if first else f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}",
            "" if first else f"{row['speedup_allowed']:.2f}x",
            "" if first else f"{row['share_of_allowed']:.0%}",
            f"{row['speedup_over_eager']:.2f}x",
            f"{row['macs'] / 1e9:.2f} G",
            "" if row["graph_macs"] is None else f"{row['graph_macs'] / 1e9:.2f} G",
        )
    return table
