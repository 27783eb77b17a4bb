"""Reliable timing: subjects take turns in blocks, and the first runs of each block are warm-up.

After a switch from one runtime to another, the first runs are slow because the spinning threads of the two
runtimes get in each other's way. Subjects that take turns see the same load on a shared machine.

A session that is opened again is faster or slower by a few per cent for as long as it is open. So one opening
(a session opened anew and timed) says little about the next, however long it is timed, and several openings
are needed (T. Kalibera, R. Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Clock = Callable[[], float]
_Blocks = dict[str, list[tuple[float, ...]]]
# Warm-up runs at the start of a block: at most this many, and none after this time. The disturbance lasts a
# few milliseconds, so one run is enough if a run takes longer than that.
_WARMUP_RUNS = 10
_WARMUP_SECONDS = 0.1
_MIN_RUNS = 2
_RESAMPLES = 2000


@dataclass(frozen=True)
class Timings:
    """Durations of runs in milliseconds, by opening and block.

    All openings have the same number of blocks.

    Attributes:
        openings_ms: The openings, each a tuple of blocks, each a tuple of durations.
    """

    openings_ms: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def median_ms(self) -> float:
        """The median of the openings' medians, each of which is the median of its blocks' medians."""
        return float(np.median(self.opening_medians_ms))

    @property
    def opening_medians_ms(self) -> tuple[float, ...]:
        """The median of the blocks' medians, for each opening."""
        return tuple(np.median(self.block_medians_ms, axis=1).tolist())

    @property
    def block_medians_ms(self) -> np.ndarray:
        """The median of each block, (openings, blocks)."""
        return np.array([_medians(blocks) for blocks in self.openings_ms])

    @property
    def num_runs(self) -> int:
        """The number of runs, without warm-up."""
        return len(self._runs())

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile of all runs."""
        return float(np.percentile(self._runs(), percent))

    def _runs(self) -> list[float]:
        return [duration for blocks in self.openings_ms for block in blocks for duration in block]


@dataclass(frozen=True)
class Speedup:
    """Speed-up with its 95 % confidence interval.

    Attributes:
        value: The median of the openings' ratios.
        low: Lower bound of the interval.
        high: Upper bound of the interval.
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
    """Time several subjects in alternating blocks, A B C A B C …, until their medians are stable.

    Args:
        subjects: Functions to call, by name.
        block_seconds: Minimum duration of the counted runs of one block.
        max_rounds: Largest number of blocks per subject. At least 2 * window rounds run in any case.
        window: Number of rounds that are compared with as many rounds before them. None means that nothing is
            compared and every round counts.
        tolerance: Largest difference between the two medians, as a share.
        clock: Function that returns seconds. Replaced in tests.
        progress: Called after each block.

    Returns:
        The rounds that count, which are the last 2 * window, and whether the medians are stable for every
        subject.
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
    """Join the timings of the same subjects from several openings."""
    return {
        name: Timings(tuple(blocks for opening in openings for blocks in opening[name].openings_ms))
        for name in openings[0]
    }


def speedup(slow: Timings, fast: Timings, *, seed: int = 0) -> Speedup:
    """Compute the speed-up: the median, over openings, of the ratio of the medians.

    The interval is a bootstrap over openings, and over the rounds within each opening. Both keep runs paired
    that ran side by side. The interval of a single opening covers only the variation from round to round.
    With five openings the interval contains the true value in 95 of 100 cases, with three in 85
    (`tests/test_timing.py` simulates this).

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
    return Speedup(float(np.median(found)), float(low), float(high), tuple(found.tolist()))


def _medians(blocks: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([np.median(block) for block in blocks])
