"""Timing, with a clock that the test turns."""

import itertools
from collections.abc import Callable

import pytest

from variator_export.stages.timing import Timings, speedup, time_in_turns, time_until_settled


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _subjects(clock: Clock, order: list[str], **seconds: float) -> dict[str, object]:
    def make(name: str, duration: float) -> object:
        def call() -> None:
            order.append(name)
            clock.now += duration

        return call

    return {name: make(name, duration) for name, duration in seconds.items()}


def test_subjects_take_turns_in_blocks() -> None:
    clock, order = Clock(), []
    subjects = _subjects(clock, order, slow=1.0, fast=0.001)
    timings = time_in_turns(subjects, rounds=3, block_seconds=0.01, clock=clock)  # type: ignore[arg-type]
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["slow", "fast"] * 3
    assert timings["slow"].median_ms == pytest.approx(1000)
    assert timings["fast"].median_ms == pytest.approx(1)


def test_the_first_runs_of_a_block_do_not_count() -> None:
    clock = Clock()
    calls = 0

    def settles() -> None:
        nonlocal calls
        clock.now += 0.005 if calls % 20 < 10 else 0.001
        calls += 1

    timings = time_in_turns({"a": settles}, rounds=2, block_seconds=0.0095, clock=clock)
    assert [len(block) for block in timings["a"].blocks_ms] == [10, 10]
    assert timings["a"].median_ms == pytest.approx(1)
    assert max(timings["a"].blocks_ms[0]) == pytest.approx(1)


def test_a_slow_subject_is_warmed_up_once_and_measured_twice() -> None:
    clock, order = Clock(), []
    subjects = _subjects(clock, order, slow=3.0)
    timings = time_in_turns(subjects, rounds=1, block_seconds=0.4, clock=clock)  # type: ignore[arg-type]
    assert order == ["slow"] * 3
    assert len(timings["slow"].blocks_ms[0]) == 2


def test_a_speedup_is_a_ratio_of_medians_with_an_interval() -> None:
    slow = Timings(((10.0, 10.0), (12.0, 12.0), (11.0, 99.0)))
    fast = Timings(((5.0, 5.0), (6.0, 6.0), (5.5, 5.5)))
    found = speedup(slow, fast)
    assert found.low <= found.value <= found.high
    steady = speedup(Timings(((10.0,), (20.0,), (40.0,))), Timings(((5.0,), (10.0,), (20.0,))))
    assert (steady.low, steady.value, steady.high) == (2.0, 2.0, 2.0), "a loaded machine slows both"


def _drifting(clock: Clock, seconds: Callable[[int], float]) -> Callable[[], None]:
    """A subject whose n-th run takes seconds(n)."""
    runs = itertools.count()

    def call() -> None:
        clock.now += seconds(next(runs))

    return call


def test_rounds_are_added_until_the_medians_stand_still() -> None:
    clock = Clock()
    # Three runs a round: one to warm up, two that count. It warms up over the first 8 rounds.
    subject = _drifting(clock, lambda run: 1.0 + max(0.0, 0.5 - 0.02 * run))
    options = {"block_seconds": 0.1, "window": 3, "tolerance": 0.01, "clock": clock}
    timings, settled = time_until_settled({"a": subject}, max_rounds=30, **options)  # type: ignore[arg-type]
    assert settled
    assert len(timings["a"].blocks_ms) == 6
    assert timings["a"].median_ms == pytest.approx(1000, rel=0.02)
    never = _drifting(clock, lambda run: 1.0 + 0.1 * run)
    timings, settled = time_until_settled({"a": never}, max_rounds=7, **options)  # type: ignore[arg-type]
    assert not settled
    assert len(timings["a"].blocks_ms) == 6


def test_one_subject_that_does_not_settle_keeps_all_going() -> None:
    clock = Clock()
    rounds = 0

    def count() -> None:
        nonlocal rounds
        rounds += 1

    subjects = {"still": _drifting(clock, lambda _: 1.0), "never": _drifting(clock, lambda run: 1.0 + run)}
    found, settled = time_until_settled(
        subjects, block_seconds=0.1, window=2, max_rounds=9, clock=clock, progress=count
    )
    assert not settled
    assert rounds == 18
    assert found.keys() == subjects.keys()


def test_percentiles_are_of_all_runs() -> None:
    timings = Timings((tuple(float(n) for n in range(1, 51)), tuple(float(n) for n in range(51, 101))))
    assert timings.num_runs == 100
    assert timings.percentile_ms(50) == pytest.approx(50.5)
    assert timings.percentile_ms(99) == pytest.approx(99.01)
