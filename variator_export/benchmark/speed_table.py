"""Speed-ups over the alternatives that a user has, beside the speed-ups that the saved MACs allow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from variator_export.benchmark.timing import Speedup, Timings, speedup
from variator_export.engines.base import Arrays, Runner

_EAGER = "eager/ratio-1"


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one call.

    Attributes:
        analytic: Number by formula, at the unpadded shape.
        on_graph: Number counted on the graph. None if the subject has no graph of its own.
    """

    analytic: int
    on_graph: int | None


@dataclass(frozen=True)
class Subject:
    """Subject of a benchmark: one variant on one runtime, which is timed.

    Attributes:
        runtime: Name of the runtime, for example `eager` or `onnxruntime`.
        group: Name of the group. Speed-ups are over the fastest baseline among the runtimes of one group.
        ratio: The ratio k.
        variant: The variant's name.
        runner: The runner of the variant.
        baseline: Whether the variant is the backbone without plugins.
    """

    runtime: str
    group: str
    ratio: int
    variant: str
    runner: Runner
    baseline: bool = False

    @property
    def key(self) -> str:
        """Unique name of the subject."""
        return f"{self.runtime}/{self.variant}"


def speed_inputs(names: tuple[str, ...], vocab_size: int, batch_size: int, sequence_length: int) -> Arrays:
    """Create inputs with full rows of random tokens."""
    shape = (batch_size, sequence_length)
    inputs = {name: np.zeros(shape, np.int64) for name in names}
    inputs["input_ids"][:] = np.random.default_rng(0).integers(0, vocab_size, shape)
    inputs["attention_mask"][:] = 1
    return inputs


def speed_rows(
    subjects: Sequence[Subject],
    timings: Mapping[str, Timings],
    macs: Mapping[str, Macs],
    num_tokens: int,
) -> list[dict[str, Any]]:
    """Return a JSON row for each subject.

    Args:
        subjects: The timed subjects. Each group must contain at least one baseline.
        timings: Timings by `Subject.key`.
        macs: Multiply-accumulates of one call, by `Subject.key`.
        num_tokens: Number of tokens in one call.

    Returns:
        Rows with the median and tails of all runs; tokens per second; the speed-up over the group's fastest
        run without plugins, also in each opening; the speed-up over eager PyTorch; the 95 % intervals of
        both; and the speed-up that the saved MACs would allow.
    """
    rows = []
    for subject in subjects:
        own = timings[subject.key]
        baseline = min(
            (s for s in subjects if s.group == subject.group and s.baseline),
            key=lambda s: timings[s.key].median_ms,
        )
        gained = speedup(timings[baseline.key], own)
        over_eager = speedup(timings[_EAGER], own) if _EAGER in timings else None
        allowed = macs[baseline.key].analytic / macs[subject.key].analytic
        rows.append(
            {
                "runtime": subject.runtime,
                "variant": subject.variant,
                "ratio": subject.ratio,
                "is_baseline": subject.baseline,
                "median_ms": round(own.median_ms, 3),
                "p50_ms": round(own.percentile_ms(50), 3),
                "p90_ms": round(own.percentile_ms(90), 3),
                "p99_ms": round(own.percentile_ms(99), 3),
                "runs": own.num_runs,
                "tokens_per_second": round(num_tokens / own.median_ms * 1e3, 1),
                "baseline": baseline.runtime,
                **speedup_fields(gained, allowed),
                "speedup_over_eager": round(over_eager.value, 4) if over_eager else None,
                "speedup_over_eager_low": round(over_eager.low, 4) if over_eager else None,
                "speedup_over_eager_high": round(over_eager.high, 4) if over_eager else None,
                "macs": macs[subject.key].analytic,
                "graph_macs": macs[subject.key].on_graph,
            }
        )
    return rows


def speedup_fields(gained: Speedup, allowed: float) -> dict[str, Any]:
    """A speed-up as fields of a row, beside the one that is allowed."""
    return {
        "speedup": round(gained.value, 4),
        "speedup_low": round(gained.low, 4),
        "speedup_high": round(gained.high, 4),
        "speedup_of_openings": [round(ratio, 4) for ratio in gained.openings],
        "speedup_allowed": round(allowed, 4),
        "share_of_allowed": round(gained.value / allowed, 4),
    }


SPEED_COLUMNS = ("p50 ms", "p90", "p99", "tokens/s", "speed-up", "95 % interval", "MACs allow", "reached")


def speed_cells(row: Mapping[str, Any]) -> list[str]:
    """Format a row of `speed_rows` for reading, in the order of `SPEED_COLUMNS`."""
    plain = row["is_baseline"]
    return [
        f"{row['p50_ms']:.2f}",
        f"{row['p90_ms']:.2f}",
        f"{row['p99_ms']:.2f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['speedup']:.2f}x",
        f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}",
        "" if plain else f"{row['speedup_allowed']:.2f}x",
        "" if plain else f"{row['share_of_allowed']:.0%}",
    ]


def break_even(
    shapes: Sequence[tuple[tuple[int, int], Sequence[Mapping[str, Any]]]],
) -> list[dict[str, Any]]:
    """Find the shape from which on each ratio pays.

    Args:
        shapes: Pairs of a shape (batch_size, sequence_length) and its rows.

    Returns:
        A row for each runtime and variant with the smallest shape, by tokens, from which on the lower bound
        of the speed-up is above 1 at every shape. The shape is None if the lower bound is not above 1 at the
        largest one.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for shape, rows in sorted(shapes, key=lambda item: (item[0][0] * item[0][1], item[0]), reverse=True):
        for row in rows:
            if row["is_baseline"]:
                continue
            key = (row["runtime"], row["variant"])
            entry = found.setdefault(
                key, {"runtime": key[0], "variant": key[1], "pays_from": None, "ended": False}
            )
            if row["speedup_low"] <= 1:
                entry["ended"] = True
            elif not entry["ended"]:
                entry["pays_from"] = list(shape)
    return [{name: value for name, value in entry.items() if name != "ended"} for entry in found.values()]
