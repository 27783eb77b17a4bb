"""Timing that can be believed: subjects take turns in blocks, the first runs of a block do not count.

After a switch from one runtime to another the first runs are slow, because the spinning threads of the two
get in each other's way. Subjects that take turns see the same load of a shared machine.

A session that is opened again is faster or slower by some per cent, for as long as it is open. So one
opening says little of the next, however long it is timed, and what counts are several (T. Kalibera, R. Jones,
Rigorous Benchmarking in Reasonable Time, ISMM 2013).
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
    """Durations in milliseconds: of each opening its blocks, of each block its runs.

    Every opening has as many blocks as the others.
    """

    openings_ms: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def median_ms(self) -> float:
        """The median of the openings' medians, each of which is the median of its blocks' medians."""
        return float(np.median(self.opening_medians_ms))

    @property
    def opening_medians_ms(self) -> tuple[float, ...]:
        """Of each opening the median of its blocks' medians."""
        return tuple(np.median(self.block_medians_ms, axis=1).tolist())

    @property
    def block_medians_ms(self) -> np.ndarray:
        """(openings, blocks)."""
        return np.array([_medians(blocks) for blocks in self.openings_ms])

    @property
    def num_runs(self) -> int:
        """How many runs count."""
        return len(self._runs())

    def percentile_ms(self, percent: float) -> float:
        """A percentile of all runs."""
        return float(np.percentile(self._runs(), percent))

    def _runs(self) -> list[float]:
        return [duration for blocks in self.openings_ms for block in blocks for duration in block]


@dataclass(frozen=True)
class Ratio:
    """How many times faster, with a 95 % confidence interval.

    Attributes:
        value: The median of the openings' ratios.
        low: From here...
        high: ...to here.
        openings: The ratio of medians in each opening.
    """

    value: float
    low: float
    high: float
    openings: tuple[float, ...]


def time_in_turns(
    subjects: Mapping[str, Callable[[], object]],
    *,
    block_seconds: float,
    max_rounds: int,
    window: int | None = None,
    tolerance: float = 0.03,
    clock: Clock = time.perf_counter,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Timings], bool]:
    """Time several subjects in alternating blocks, A B C A B C …, until their medians stand still.

    Args:
        subjects: What to call, by name.
        block_seconds: How long the counted runs of one block take at least.
        max_rounds: The most blocks of each; at least 2 * window.
        window: Rounds that are compared with as many before them; None: nothing is compared, and every round
            counts.
        tolerance: How far their medians may be apart, as a share.
        clock: Seconds; replaced in tests.
        progress: Called after each block.

    Returns:
        The rounds that count, the last 2 * window, and whether they stand still for every subject.
    """
    blocks: _Blocks = {name: [] for name in subjects}
    settled, counted = False, max_rounds if window is None else 2 * window
    for finished in range(1, max(max_rounds, counted) + 1):
        _take_turns(subjects, blocks, block_seconds, clock, progress)
        if window is not None and finished >= counted:
            settled = all(_stands_still(found, window, tolerance) for found in blocks.values())
        if settled:
            break
    return {name: Timings((tuple(found[-counted:]),)) for name, found in blocks.items()}, settled


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
    medians = _medians(blocks[-2 * window :])
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


def join(openings: Sequence[Mapping[str, Timings]]) -> dict[str, Timings]:
    """The timings of the same subjects, opened several times."""
    return {
        name: Timings(tuple(blocks for opening in openings for blocks in opening[name].openings_ms))
        for name in openings[0]
    }


def speedup(slow: Timings, fast: Timings, *, seed: int = 0) -> Ratio:
    """How many times faster: the median, over openings, of the ratio of their medians.

    The interval is a bootstrap over openings, and in each over its rounds. Both keep paired what ran side by
    side. Of a single opening it holds what differs from round to round only. With five openings it holds the
    truth in 95 of 100 cases, with three in 85 (`tests/test_timing.py` simulates it).

    Raises:
        ValueError: The two were not timed in the same openings and rounds.
    """
    slow_medians, fast_medians = slow.block_medians_ms, fast.block_medians_ms
    if slow_medians.shape != fast_medians.shape:
        raise ValueError(f"{slow_medians.shape} openings and rounds are not {fast_medians.shape}")
    num_openings, num_rounds = slow_medians.shape
    random = np.random.default_rng(seed)
    openings = random.integers(0, num_openings, (_RESAMPLES, num_openings, 1))
    rounds = random.integers(0, num_rounds, (_RESAMPLES, num_openings, num_rounds))
    resampled = np.median(slow_medians[openings, rounds], axis=2) / np.median(
        fast_medians[openings, rounds], axis=2
    )
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    found = np.median(slow_medians, axis=1) / np.median(fast_medians, axis=1)
    return Ratio(float(np.median(found)), float(low), float(high), tuple(found.tolist()))


def _medians(blocks: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([np.median(block) for block in blocks])
