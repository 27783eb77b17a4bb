"""Strategies that choose an assembly for a budget, from what each layer weighs and how long it takes.

Both leave out as few layers as the budget allows. Of assemblies that leave out equally many, *speed-first*
chooses the fastest, and so begins with the stack whose layers take longest: the decoder, which runs for every
token. *Size-first* chooses the one with the fewest stored weights (Modular Transformers, arXiv 2306.02379,
names the two; their rules are not published, and these are ours).
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from variator_export.core.assembly import Assembly, Span, Stack
from variator_export.core.errors import UserError

Strategy = Literal["speed-first", "size-first"]
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(" + "|".join(_UNITS) + ")")


@dataclass(frozen=True)
class StackCost:
    """What the layers of a stack cost.

    Attributes:
        num_layers: Original layers.
        layer_ms: Time of one layer in one request, in milliseconds.
        layer_bytes: Stored weights of one layer, which are those of a module too.
        modules: The layers that each available module replaces.
    """

    num_layers: int
    layer_ms: float
    layer_bytes: int
    modules: Collection[Span]


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        request_ms: Time of one request, in milliseconds; None if it was not measured, as no budget needs it.
        weight_bytes: Stored weights.
        stacks: The stacks.
    """

    request_ms: float | None
    weight_bytes: int
    stacks: Mapping[Stack, StackCost]


@dataclass(frozen=True)
class Choice:
    """An assembly, and what it is expected to cost.

    Attributes:
        assembly: The assembly.
        left_out: How many layers fewer it has than the original.
        speedup: How many times faster than the original it is expected to be; None if nothing was measured.
        weight_bytes: Its stored weights.
    """

    assembly: Assembly
    left_out: int
    speedup: float | None
    weight_bytes: int

    def __str__(self) -> str:
        faster = (
            "" if self.speedup is None else f", expected to be {self.speedup:.2f}x faster than the original"
        )
        named = str(self.assembly) if self.left_out else "the original"
        return f"{named}, with {self.weight_bytes / 1e6:.1f} MB of weights{faster}"


def choose_assembly(
    cost: Cost, strategy: Strategy, *, speedup: float | None = None, max_weight_bytes: int | None = None
) -> Choice:
    """Choose an assembly for a budget.

    Args:
        cost: What the original costs.
        strategy: The strategy.
        speedup: How many times faster than the original the assembly has to be at least.
        max_weight_bytes: Its stored weights at most.

    Raises:
        UserError: No assembly of the modules is within the budget. The message names the best.
    """
    found = list(_choices(cost))
    faster = [choice for choice in found if speedup is None or (choice.speedup or 0.0) >= speedup]
    within = [
        choice for choice in faster if max_weight_bytes is None or choice.weight_bytes <= max_weight_bytes
    ]
    if not within:
        wanted = [f"{speedup:g}x faster"] if speedup is not None else []
        wanted += [f"at most {max_weight_bytes / 1e6:g} MB"] if max_weight_bytes is not None else []
        best = min(found, key=lambda choice: (-(choice.speedup or 0.0), choice.weight_bytes))
        raise UserError(
            f"No assembly of these modules is {' and '.join(wanted)}. The best is {best}.",
            "Ask for less, or train modules that each replace more layers.",
        )
    if strategy == "speed-first":
        return min(
            within, key=lambda choice: (choice.left_out, -(choice.speedup or 0.0), choice.weight_bytes)
        )
    return min(within, key=lambda choice: (choice.left_out, choice.weight_bytes, -(choice.speedup or 0.0)))


def _choices(cost: Cost) -> Iterator[Choice]:
    """Yield the best assembly for each number of layers that each stack leaves out."""
    of_stacks = {stack: best_by_left_out(own.num_layers, own.modules) for stack, own in cost.stacks.items()}
    for counts in itertools.product(*of_stacks.values()):
        left_out = dict(zip(of_stacks, counts, strict=True))
        saved_ms = sum(count * cost.stacks[stack].layer_ms for stack, count in left_out.items())
        saved = sum(count * cost.stacks[stack].layer_bytes for stack, count in left_out.items())
        listed = {stack: of_stacks[stack][count] for stack, count in left_out.items() if count}
        yield Choice(
            Assembly(**listed),
            sum(counts),
            None if cost.request_ms is None else cost.request_ms / max(cost.request_ms - saved_ms, 1e-9),
            cost.weight_bytes - saved,
        )


def best_by_left_out(num_layers: int, modules: Collection[Span]) -> dict[int, tuple[int, ...]]:
    """The granularities that are chosen for each number of layers that can be left out of a stack.

    Many modules that replace few layers come before few that replace many. Then the last layers are replaced
    before the first: of MiniLM, those lose less (docs/modular.md).

    Args:
        num_layers: Layers of the stack.
        modules: The layers that each available module replaces.
    """
    # By the number of layers left out, the best way to cover the layers from a place on.
    best: list[dict[int, tuple[int, ...]]] = [{} for _ in range(num_layers)] + [{0: ()}]
    for first in reversed(range(num_layers)):
        spans = [Span(first, first), *(s for s in modules if s.first == first and s.last < num_layers)]
        for span in spans:
            for left_out, rest in best[span.last + 1].items():
                found = (span.granularity, *rest)
                count = left_out + span.granularity - 1
                if count not in best[first] or _order(found) < _order(best[first][count]):
                    best[first][count] = found
    return best[0]


def _order(granularities: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return sum(size**2 for size in granularities), granularities


def parse_size(text: str) -> int:
    """Read a size such as `150MB` or `1.5 GiB`, in bytes.

    Raises:
        UserError: The text is not a size.
    """
    if (match := _SIZE.fullmatch(text.strip())) is None:
        raise UserError(
            f"{text!r} is not a size.",
            f"Give a number and a unit, such as 150MB; units: {', '.join(_UNITS)}.",
        )
    return int(float(match[1]) * _UNITS[match[2]])
