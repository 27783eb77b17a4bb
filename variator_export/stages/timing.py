"""Timing that can be believed: subjects take turns in blocks, the first runs of a block do not count.

After a switch from one runtime to another the first runs are slow, because the spinning threads of the two
get in each other's way. Subjects that take turns see the same load of a shared machine.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Clock = Callable[[], float]
_Blocks = dict[str, list[tuple[float, ...]]]
# Runs at the start of a block that do not count, while they are short: the disturbance lasts some
# milliseconds, so one run is enough where a run takes longer than that.
_WARMUP_RUNS = 10
_WARMUP_SECONDS = 0.1
_MIN_RUNS = 2
_RESAMPLES = 2000


@dataclass(frozen=True)
class Timings:
    """Durations in milliseconds, one list for each block."""

    blocks_ms: tuple[tuple[float, ...], ...]

    @property
    def median_ms(self) -> float:
        """The median of the blocks' medians, of which `speedup` takes ratios too."""
        return float(np.median(_block_medians(self.blocks_ms)))

    @property
    def num_runs(self) -> int:
        """How many runs count."""
        return sum(len(block) for block in self.blocks_ms)

    def percentile_ms(self, percent: float) -> float:
        """A percentile of all runs."""
        return float(np.percentile([duration for block in self.blocks_ms for duration in block], percent))


@dataclass(frozen=True)
class Ratio:
    """How many times faster, with a 95 % confidence interval (bootstrap over rounds)."""

    value: float
    low: float
    high: float


def time_in_turns(
    subjects: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    block_seconds: float,
    clock: Clock = time.perf_counter,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Timings]:
    """Time several subjects in alternating blocks: A B C A B C …

    Args:
        subjects: What to call, by name.
        rounds: Blocks of each.
        block_seconds: How long the counted runs of one block take at least.
        clock: Seconds; replaced in tests.
        progress: Called after each block.
    """
    blocks: _Blocks = {name: [] for name in subjects}
    for _ in range(rounds):
        _take_turns(subjects, blocks, block_seconds, clock, progress)
    return {name: Timings(tuple(found)) for name, found in blocks.items()}


def time_until_settled(
    subjects: Mapping[str, Callable[[], object]],
    *,
    block_seconds: float,
    window: int = 5,
    tolerance: float = 0.03,
    max_rounds: int = 40,
    clock: Clock = time.perf_counter,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Timings], bool]:
    """Time several subjects in alternating blocks until their medians stand still.

    Args:
        subjects: What to call, by name.
        block_seconds: How long the counted runs of one block take at least.
        window: Rounds that are compared with as many before them.
        tolerance: How far their medians may be apart, as a share.
        max_rounds: After these it ends in any case.
        clock: Seconds; replaced in tests.
        progress: Called after each block.

    Returns:
        The last 2 * window rounds, and whether they stand still for every subject.
    """
    blocks: _Blocks = {name: [] for name in subjects}
    settled = False
    for finished in range(1, max(max_rounds, 2 * window) + 1):
        _take_turns(subjects, blocks, block_seconds, clock, progress)
        settled = finished >= 2 * window and all(
            _stands_still(found, window, tolerance) for found in blocks.values()
        )
        if settled:
            break
    return {name: Timings(tuple(found[-2 * window :])) for name, found in blocks.items()}, settled


def _take_turns(
    subjects: Mapping[str, Callable[[], object]],
    blocks: _Blocks,
    block_seconds: float,
    clock: Clock,
    progress: Callable[[], None],
) -> None:
    for name, call in subjects.items():
        blocks[name].append(_block(call, block_seconds, clock))
        progress()


def _stands_still(blocks: Sequence[Sequence[float]], window: int, tolerance: float) -> bool:
    medians = _block_medians(blocks[-2 * window :])
    before, after = np.median(medians[:window]), np.median(medians[window:])
    return bool(abs(after - before) <= tolerance * before)


def _block(call: Callable[[], object], seconds: float, clock: Clock) -> tuple[float, ...]:
    start = clock()
    for _ in range(_WARMUP_RUNS):
        call()
        if clock() - start >= _WARMUP_SECONDS:
            break
    durations: list[float] = []
    start = clock()
    while len(durations) < _MIN_RUNS or clock() - start < seconds:
        before = clock()
        call()
        durations.append((clock() - before) * 1e3)
    return tuple(durations)


def speedup(slow: Timings, fast: Timings, *, seed: int = 0) -> Ratio:
    """The ratio of two medians; the interval resamples rounds, which keeps paired what ran side by side."""
    slow_medians = _block_medians(slow.blocks_ms)
    fast_medians = _block_medians(fast.blocks_ms)
    picks = np.random.default_rng(seed).integers(0, len(slow_medians), (_RESAMPLES, len(slow_medians)))
    resampled = np.median(slow_medians[picks], axis=1) / np.median(fast_medians[picks], axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Ratio(float(np.median(slow_medians) / np.median(fast_medians)), float(low), float(high))


def _block_medians(blocks: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([np.median(block) for block in blocks])
