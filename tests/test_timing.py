"""Timing, with a clock that the test turns."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from variator_export.benchmark.timing import Timings, join, speedup, time_in_turns


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
    timings, _ = time_in_turns(subjects, max_rounds=3, block_seconds=0.01, clock=clock)  # type: ignore[arg-type]
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

    timings, _ = time_in_turns({"a": settles}, max_rounds=2, block_seconds=0.0095, clock=clock)
    assert [len(block) for block in timings["a"].openings_ms[0]] == [10, 10]
    assert timings["a"].median_ms == pytest.approx(1)
    assert max(timings["a"].openings_ms[0][0]) == pytest.approx(1)


def test_a_slow_subject_is_warmed_up_once_and_measured_twice() -> None:
    clock, order = Clock(), []
    subjects = _subjects(clock, order, slow=3.0)
    timings, _ = time_in_turns(subjects, max_rounds=1, block_seconds=0.4, clock=clock)  # type: ignore[arg-type]
    assert order == ["slow"] * 3
    assert len(timings["slow"].openings_ms[0][0]) == 2


def test_a_speedup_is_a_ratio_of_medians_with_an_interval() -> None:
    slow = Timings((((10.0, 10.0), (12.0, 12.0), (11.0, 99.0)),))
    fast = Timings((((5.0, 5.0), (6.0, 6.0), (5.5, 5.5)),))
    found = speedup(slow, fast)
    assert found.low <= found.value <= found.high
    steady = speedup(_opened(10.0, 20.0, 40.0), _opened(5.0, 10.0, 20.0))
    assert (steady.low, steady.value, steady.high) == (2.0, 2.0, 2.0), "a loaded machine slows both"


def _opened(*medians: float) -> Timings:
    """Rounds of one opening."""
    return Timings((tuple((median,) for median in medians),))


def test_the_interval_holds_what_differs_between_openings() -> None:
    one = speedup(_opened(*[30.0] * 8), _opened(*[15.0] * 8))
    assert (one.low, one.value, one.high, one.openings) == (2.0, 2.0, 2.0, (2.0,)), "it cannot know"
    openings = [
        {"slow": _opened(*[slow] * 8), "fast": _opened(*[15.0] * 8)}
        for slow in (30.0, 27.0, 33.0, 31.5, 28.5)
    ]
    together = join(openings)
    found = speedup(together["slow"], together["fast"])
    assert found.openings == (2.0, 1.8, 2.2, 2.1, 1.9)
    assert (found.low, found.value, found.high) == pytest.approx((1.8, 2.0, 2.2))
    assert together["slow"].opening_medians_ms == (30.0, 27.0, 33.0, 31.5, 28.5)
    assert together["slow"].median_ms == 30.0
    assert together["slow"].num_runs == 40
    drifting = join([{"slow": _opened(2 * t, 2 * t), "fast": _opened(t, t)} for t in (1.0, 3.0, 9.0)])
    steady = speedup(drifting["slow"], drifting["fast"])
    assert (steady.low, steady.high) == (2.0, 2.0), "a machine that is slower in one opening slows both"
    with pytest.raises(ValueError, match="openings and rounds"):
        speedup(together["slow"], openings[0]["fast"])


@pytest.mark.parametrize(
    ("openings", "at_least", "at_most"), [(1, 0.2, 0.5), (3, 0.8, 0.93), (5, 0.89, 0.98)]
)
def test_how_often_the_interval_holds_the_truth(openings: int, at_least: float, at_most: float) -> None:
    """Openings differ by 3 %, rounds by 2 %, and the machine drifts by 4 %: what was seen on shared ones."""
    random = np.random.default_rng(7)
    held, cases, rounds = 0, 250, 6
    for _ in range(cases):
        drift = random.normal(0, 0.04, (openings, 1))
        two = np.exp(
            drift + random.normal(0, 0.03, (2, openings, 1)) + random.normal(0, 0.02, (2, openings, rounds))
        )
        slow, fast = (join([{"x": _opened(*opening)} for opening in subject])["x"] for subject in two)
        found = speedup(slow, fast)
        held += found.low <= 1.0 <= found.high
    assert at_least <= held / cases <= at_most


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
    timings, settled = time_in_turns({"a": subject}, max_rounds=30, **options)  # type: ignore[arg-type]
    assert settled
    assert len(timings["a"].openings_ms[0]) == 6
    assert timings["a"].median_ms == pytest.approx(1000, rel=0.02)
    never = _drifting(clock, lambda run: 1.0 + 0.1 * run)
    timings, settled = time_in_turns({"a": never}, max_rounds=7, **options)  # type: ignore[arg-type]
    assert not settled
    assert len(timings["a"].openings_ms[0]) == 6


def test_one_subject_that_does_not_settle_keeps_all_going() -> None:
    clock = Clock()
    rounds = 0

    def count() -> None:
        nonlocal rounds
        rounds += 1

    subjects = {"still": _drifting(clock, lambda _: 1.0), "never": _drifting(clock, lambda run: 1.0 + run)}
    found, settled = time_in_turns(
        subjects, block_seconds=0.1, window=2, max_rounds=9, clock=clock, progress=count
    )
    assert not settled
    assert rounds == 18
    assert found.keys() == subjects.keys()


def test_percentiles_are_of_all_runs() -> None:
    low, high = (tuple(float(n) for n in numbers) for numbers in (range(1, 51), range(51, 101)))
    timings = join([{"a": Timings(((low,),))}, {"a": Timings(((high,),))}])["a"]
    assert timings.num_runs == 100
    assert timings.percentile_ms(50) == pytest.approx(50.5)
    assert timings.percentile_ms(99) == pytest.approx(99.01)
