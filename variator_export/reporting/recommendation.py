"""Recommendation of a variant, from stored qualities and latencies and from what a deployment allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from variator_export.bundle.quality_report import counted_losses
from variator_export.core.errors import UserError

# The losses that a report shows a recommendation for, unless the user names one.
USUAL_LOSSES = (0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Goals:
    """What a deployment allows.

    Attributes:
        max_loss: The largest relative loss of any counted metric. None if every loss is allowed.
        max_latency_ms: The largest median latency of a call in milliseconds. None if all are allowed.
        shape: The batch size and sequence length of the latency. None for the largest shape that was timed.
        metrics: The metrics that count (`counted_losses`). Empty for all of them.
    """

    max_loss: float | None = None
    max_latency_ms: float | None = None
    shape: tuple[int, int] | None = None
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A variant that could be recommended.

    Attributes:
        variant: The variant's name.
        losses: Relative losses by metric and data, for example `spearman, sts.tsv`.
        latency_ms: The median latency of the runtime. None if it was not timed.
        speedup: The speed-up over the fastest run without plugins. None if it was not timed.
        reasons: Why it is not recommended, if it is not.
    """

    variant: str
    losses: Mapping[str, float]
    latency_ms: float | None
    speedup: float | None
    reasons: Sequence[str]

    @property
    def largest_loss(self) -> float:
        """The largest loss."""
        return max(self.losses.values(), default=0.0)

    def text(self) -> str:
        """The variant's numbers in words."""
        found = []
        if self.losses:
            worst = max(self.losses, key=lambda name: self.losses[name])
            lost = self.losses[worst]
            found.append(f"loses {lost:.2%} ({worst})" if lost > 0 else "loses nothing")
        if self.latency_ms is not None:
            found.append(f"takes {self.latency_ms:.1f} ms ({self.speedup:.2f}x)")
        return " and ".join(found)


@dataclass(frozen=True)
class Recommendation:
    """The variant to deploy.

    Attributes:
        goals: What was asked for.
        runtime: The runtime whose latency counts. None if nothing was timed.
        shape: The shape of the latency. None if nothing was timed.
        variant: The recommended variant. None if no variant meets the goals.
        candidates: All variants, with the reasons against them.
    """

    goals: Goals
    runtime: str | None
    shape: tuple[int, int] | None
    variant: str | None
    candidates: Sequence[Candidate]

    @property
    def chosen(self) -> Candidate | None:
        """The recommended variant with its numbers."""
        return next((c for c in self.candidates if c.variant == self.variant), None)

    def text(self) -> str:
        """The recommendation in words, with the reasons against every variant that was ruled out."""
        wanted = []
        if self.goals.max_loss is not None:
            of = f" of {', '.join(self.goals.metrics)}" if self.goals.metrics else ""
            wanted.append(f"at most {_percent(self.goals.max_loss)}{of} lost")
        if self.goals.max_latency_ms is not None:
            wanted.append(f"at most {self.goals.max_latency_ms:g} ms")
        asked = f"For {' and '.join(wanted)}"
        if self.shape is not None:
            asked += f" ({self.runtime}, {self.shape[0]} x {self.shape[1]} tokens)"
        found = "none" if (chosen := self.chosen) is None else f"{chosen.variant}, which {chosen.text()}"
        against = [f"{c.variant} {', '.join(c.reasons)}" for c in self.candidates if c.reasons]
        return ". ".join([f"{asked}: {found}", *(["; ".join(against)] if against else [])]) + "."


def overview(recommendations: Sequence[Recommendation]) -> list[str]:
    """Put recommendations for several losses into one line for each set of metrics."""
    lines: dict[str, list[str]] = {}
    for found in recommendations:
        of = ", ".join(found.goals.metrics) or "any metric"
        lines.setdefault(of, []).append(f"at most {_percent(found.goals.max_loss or 0)}: {found.variant}")
    return [f"Fastest variant by what is lost of {of}: {'; '.join(found)}." for of, found in lines.items()]


def recommend(
    goals: Goals,
    variants: Sequence[str],
    qualities: Sequence[Mapping[str, Any]],
    benchmark: Mapping[str, Any] | None,
    runtime: str = "onnxruntime",
) -> Recommendation:
    """Recommend a variant: the fastest one within a loss, or the one that loses least within a latency.

    Args:
        goals: What the deployment allows.
        variants: Names of the bundle's variants, the uncompressed one first.
        qualities: Results of `evaluate`, as `quality_of_graphs` returns them.
        benchmark: The stored benchmark. None if there is none.
        runtime: The runtime whose latency counts.

    Raises:
        UserError: What the goals are about was not measured.
    """
    measured = {
        name
        for quality in qualities
        for variant in variants
        for name in counted_losses(quality, variant, goals.metrics)
    }
    if goals.max_loss is not None and not measured:
        raise UserError(
            "No quality was measured" + (f" by {', '.join(goals.metrics)}." if goals.metrics else "."),
            "Run `variator-export evaluate` on the bundle first.",
        )
    shape, rows = _timed(goals, benchmark, runtime)
    candidates = [_candidate(goals, name, variants[0], qualities, rows.get(name)) for name in variants]
    fits = [c for c in candidates if not c.reasons]
    if goals.max_latency_ms is not None:
        chosen = min(fits, key=lambda c: c.largest_loss, default=None)
    elif rows:
        chosen = min(fits, key=lambda c: c.latency_ms or 0.0, default=None)
    else:  # the last one computes least
        chosen = fits[-1] if fits else None
    return Recommendation(
        goals, runtime if rows else None, shape, None if chosen is None else chosen.variant, candidates
    )


def _timed(
    goals: Goals, benchmark: Mapping[str, Any] | None, runtime: str
) -> tuple[tuple[int, int] | None, dict[str, Mapping[str, Any]]]:
    """Return the shape of the latency, and the rows of the runtime by variant."""
    shapes = {
        (shape["batch_size"], shape["sequence_length"]): rows
        for shape in (benchmark or {"shapes": []})["shapes"]
        if (rows := {row["variant"]: row for row in shape["rows"] if row["runtime"] == runtime})
    }
    if goals.shape is not None and goals.shape not in shapes:
        there = ", ".join(f"{b}x{s}" for b, s in shapes) or "no shape"
        raise UserError(
            f"{runtime} was not timed at {goals.shape[0]}x{goals.shape[1]}, only at {there}.",
            "Time it: variator-export bench BUNDLE --shape {}x{}".format(*goals.shape),
        )
    if not shapes:
        if goals.max_latency_ms is not None:
            raise UserError(f"{runtime} was not timed.", "Run `variator-export bench` on the bundle first.")
        return None, {}
    shape = goals.shape or max(shapes, key=lambda s: s[0] * s[1])
    return shape, shapes[shape]


def _candidate(
    goals: Goals,
    variant: str,
    uncompressed: str,
    qualities: Sequence[Mapping[str, Any]],
    row: Mapping[str, Any] | None,
) -> Candidate:
    losses: dict[str, float] = {}
    reasons: list[str] = []
    for quality in qualities:
        found = counted_losses(quality, variant, goals.metrics)
        losses |= {f"{name}, {quality['data']}": lost for name, lost in found.items()}
    if goals.max_loss is not None:
        if variant != uncompressed and not losses:
            reasons.append("was not evaluated")
        worst = max(losses, key=lambda name: losses[name], default=None)
        if worst is not None and losses[worst] > goals.max_loss:
            reasons.append(f"loses {losses[worst]:.2%} ({worst})")
    latency = None if row is None else float(row["median_ms"])
    if goals.max_latency_ms is not None:
        if latency is None:
            reasons.append("was not timed")
        elif latency > goals.max_latency_ms:
            reasons.append(f"takes {latency:.1f} ms")
    speedup = None if row is None else float(row["speedup"])
    return Candidate(variant, losses, latency, speedup, reasons)


def _percent(share: float) -> str:
    return f"{share * 100:g} %"
