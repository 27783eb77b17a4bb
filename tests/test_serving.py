"""The core of serving on a simulated clock: what waits, what runs next at which ratio, what is refused."""

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.engines.batches import longest_beside
from variator_export.serving.batcher import Batcher, Row
from variator_export.serving.calibration import calibrate, token_budget
from variator_export.serving.cost_model import CostModel, Measurement, Terms
from variator_export.serving.policies import (
    BacklogPolicy,
    Option,
    QueueState,
    RatioPolicy,
    SlackPolicy,
    StaticPolicy,
    make_policy,
)
from variator_export.serving.scheduler import Batch, Limits, Refused, Scheduler
from variator_export.serving.service import Answer, Closed, Listener, RowFailed, Service
from variator_export.serving.simulation import Arrival, simulate
from variator_export.serving.variants import ServedVariant, Variants, level_of
from variator_export.text.tokenizer import TokenRow

LOSSES = (0.0, 0.006, 0.012, 0.014)
VARIANTS = Variants(
    [ServedVariant(f"ratio-{k}", k, loss) for k, loss in zip((1, 2, 4, 8), LOSSES, strict=True)], "spearman"
)
# MiniLM on two cores, about: 58 ms for 8 x 128 tokens at ratio 1.
TERMS = {
    f"ratio-{k}": Terms(0.4, 0.045 * share, 4e-5)
    for k, share in zip((1, 2, 4, 8), (1.0, 0.72, 0.52, 0.43), strict=True)
}


def _scheduler(policy: RatioPolicy | None = None, goal_ms: float = 500.0, **limits: object) -> Scheduler:
    return Scheduler(
        VARIANTS,
        CostModel(TERMS),
        policy or BacklogPolicy(),
        Limits(goal_ms, **({"max_batch_tokens": 1024, "max_batch_rows": 32} | limits)),  # type: ignore[arg-type]
    )


def _arrivals(load: float, count: int = 3000, seed: int = 0) -> list[Arrival]:
    """Random arrivals of random lengths, as a share of what ratio 1 carries."""
    rng = random.Random(seed)
    cost = CostModel(TERMS)
    lengths = [rng.choice((16, 60, 128, 300, 512)) for _ in range(count)]
    mean = sum(cost.batch_ms("ratio-1", 1, length) for length in lengths) / count
    at = itertools.accumulate(rng.expovariate(load / mean) for _ in lengths)
    return [Arrival(time, length) for time, length in zip(at, lengths, strict=True)]


# The batcher.


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 600), st.floats(0, 1000)), max_size=60),
    st.integers(1, 2000),
    st.integers(1, 20),
    st.sets(st.integers(0, 59)),
)
def test_no_row_is_lost_or_given_out_twice(
    rows: list[tuple[int, float]], max_tokens: int, max_rows: int, cancelled: set[int]
) -> None:
    batcher = Batcher(max_tokens, max_rows)
    there = [Row(length, (0,), 0.0, deadline) for length, deadline in rows]
    for row in there:
        batcher.add(row)
    for index in cancelled & set(range(len(there))):
        assert batcher.discard(there[index])
        assert not batcher.discard(there[index])
    left = [row for index, row in enumerate(there) if index not in cancelled]
    assert batcher.total().tokens == sum(row.length for row in left)
    seen: list[Row] = []
    while len(batcher):
        earliest = min(row.deadline_ms for row in batcher)
        assert batcher.last_deadline_ms() == max(row.deadline_ms for row in batcher)
        batch = batcher.peek(lambda _: True)
        assert batch[0].deadline_ms == earliest  # nothing waits for ever
        longest, shortest = max(row.length for row in batch), min(row.length for row in batch)
        assert len(batch) <= max_rows
        assert len(batch) == 1 or longest * len(batch) <= max_tokens
        assert longest <= longest_beside(shortest)
        for row in batch:
            assert batcher.discard(row)
        seen += batch
    assert len(seen) == len(left)
    assert {id(row) for row in seen} == {id(row) for row in left}
    assert batcher.head() is None
    assert batcher.last_deadline_ms() is None
    assert batcher.total().rows == batcher.total().pairs == 0


def test_rows_that_may_not_run_together_do_not() -> None:
    batcher = Batcher(1000, 10)
    rows = [Row(10, (0,) if index % 2 else (1,), 0.0, float(index)) for index in range(6)]
    for row in rows:
        batcher.add(row)
    batch = batcher.peek(lambda row: row.allowed == (1,))
    assert {id(row) for row in batch} == {id(rows[index]) for index in (0, 2, 4)}


def test_rows_that_are_done_are_forgotten_while_others_always_wait() -> None:
    batcher = Batcher(1000, 10)
    waiting: list[Row] = []
    for step in range(5000):
        row = Row(10, (0,), 0.0, float(step))
        batcher.add(row)
        waiting.append(row)
        if len(waiting) > 20:
            batcher.discard(waiting.pop(0))
    assert len(batcher) == 20
    assert len(batcher._earliest) < 400
    assert len(batcher._latest) < 400


# The cost model.


def test_the_cost_model_finds_the_terms_that_made_the_times() -> None:
    truth = Terms(2.0, 0.03, 5e-5)
    shapes = [(1, 16), (4, 64), (16, 128), (1, 512), (4, 512)]
    model = CostModel.fit([Measurement("a", b, s, truth.ms(1, b * s, b * s * s)) for b, s in shapes])
    assert model.batch_ms("a", 8, 256) == pytest.approx(truth.ms(1, 8 * 256, 8 * 256**2), rel=1e-6)


def test_no_term_is_negative_however_odd_the_times() -> None:
    model = CostModel.fit(
        [Measurement("a", 1, 512, 1.0), Measurement("a", 1, 16, 9.0), Measurement("a", 16, 16, 3.0)]
    )
    assert min(model.batch_ms("a", rows, length) for rows in (1, 9, 100) for length in (1, 99, 4000)) > 0


def test_the_cost_model_follows_a_machine_that_became_slower_and_ignores_one_hiccup() -> None:
    model = CostModel(TERMS)
    before = model.batch_ms("ratio-4", 8, 128)
    model.observe(Measurement("ratio-1", 8, 128, 100 * model.batch_ms("ratio-1", 8, 128)))
    assert model.batch_ms("ratio-4", 8, 128) < 1.1 * before
    slow = 3 * TERMS["ratio-1"].ms(1, 1024, 8 * 128**2)
    for _ in range(60):
        model.observe(Measurement("ratio-1", 8, 128, slow))
    assert model.batch_ms("ratio-1", 8, 128) == pytest.approx(slow, rel=0.05)
    assert model.batch_ms("ratio-4", 8, 128) > 2 * before  # it is the machine, not the variant


def test_calibration_measures_within_its_time_and_finds_a_full_batch() -> None:
    def run(name: str, rows: int, length: int) -> None:
        assert name.startswith("ratio-")
        time.sleep((0.5 + 0.002 * rows * length) / 1e3)

    started = time.monotonic()
    cost, measured = calibrate(run, VARIANTS, 128, 0.3)
    assert time.monotonic() - started < 1.5
    assert {m.length for m in measured} <= {16, 64, 128}
    assert {m.variant for m in measured} == {v.name for v in VARIANTS.all}
    budget = token_budget(CostModel({v.name: Terms(0.5, 0.002, 0) for v in VARIANTS.all}), VARIANTS, 128)
    assert budget == 8192  # 0.5 ms of a call are 5 % of a batch of 5000 tokens
    assert cost.batch_ms("ratio-1", 1, 128) > cost.batch_ms("ratio-1", 1, 16)


# Variants.


def test_levels_by_loss_and_by_name() -> None:
    assert VARIANTS.within(0.012) == (0, 1, 2)
    assert VARIANTS.automatic == (0, 1, 2, 3)
    assert VARIANTS.within(0.012, (2,)) == (2,)
    with pytest.raises(UserError, match="ratio-8 is asked for, and no such one loses at most 1"):
        VARIANTS.within(0.012, (3,))
    assert VARIANTS.named("4") == VARIANTS.named("ratio-4") == (2,)
    with pytest.raises(UserError, match="no variant '3'; there is ratio-1"):
        VARIANTS.named("3")
    lossy = Variants([ServedVariant("a", 2, 0.1)])
    with pytest.raises(UserError, match=r"No variant loses at most 1\.00%"):
        lossy.within(0.01)
    with pytest.raises(UserError, match="no stored evaluation"):
        Variants([ServedVariant("a", 2, None)]).within(0.01)


def test_a_row_runs_at_the_fastest_level_that_it_allows_and_the_policy_accepts() -> None:
    assert [level_of((0, 1, 2, 3), level) for level in range(4)] == [0, 1, 2, 3]
    assert [level_of((1,), level) for level in range(4)] == [1, 1, 1, 1]
    assert [level_of((0, 2), level) for level in range(4)] == [0, 0, 2, 2]


# Policies.


def _queue(pressures: Sequence[float], batches: Sequence[float], slack: float) -> QueueState:
    options = [Option(batch, pressure) for batch, pressure in zip(batches, pressures, strict=True)]
    return QueueState(options, slack, 500.0)


def test_the_policies_choose_by_their_rules() -> None:
    queue = _queue((0.9, 0.6, 0.45, 0.4), (50, 40, 30, 20), 35)
    assert StaticPolicy(1).choose(queue) == 1
    assert SlackPolicy().choose(queue) == 2
    assert BacklogPolicy().choose(queue) == 2
    assert BacklogPolicy().choose(_queue((0.1, 0.1, 0.1, 0.1), (50, 40, 30, 20), 45)) == 1
    assert SlackPolicy().choose(_queue((0, 0), (50, 40), -10)) == 1  # late: as fast as possible
    assert BacklogPolicy().choose(_queue((2, 2), (50, 40), 500)) == 1
    with pytest.raises(UserError, match="no policy 'best'"):
        make_policy("best")
    with pytest.raises(ValueError, match="share"):
        BacklogPolicy(share=0)


def test_a_load_at_the_limit_does_not_let_the_ratio_flap() -> None:
    def changes(policy: BacklogPolicy) -> int:
        pressures = [0.49 + 0.02 * (step % 2) for step in range(100)]
        chosen = [policy.choose(_queue((p, p / 2), (5, 4), 400)) for p in pressures]
        return sum(one != other for one, other in itertools.pairwise(chosen))

    assert changes(BacklogPolicy(margin=0.0)) == 99
    assert changes(BacklogPolicy()) == 1
    held = BacklogPolicy()
    held.choose(_queue((0.6, 0.3), (5, 4), 400))
    assert held.choose(_queue((0.4, 0.2), (5, 4), 400)) == 0  # well below the limit, quality returns


@pytest.mark.parametrize("load", [0.5, 0.8, 1.0, 1.3])
def test_quality_is_never_worse_than_the_rule_asks_for(load: float) -> None:
    class Watched(BacklogPolicy):
        def choose(self, queue: QueueState) -> int:
            last, chosen = self._last, super().choose(queue)
            for better in range(chosen):
                option = queue.options[better]
                limit = 0.5 * (1 - 0.15) if better < last else 0.5
                assert option.pressure > limit or option.batch_ms > queue.slack_ms
            return chosen

    found = simulate(_arrivals(load, 1500), _scheduler(Watched()))
    assert len(found.batches) > 100


def test_the_backlog_policy_meets_the_goal_where_the_others_do_not() -> None:
    arrivals = _arrivals(1.15)
    within, lost = {}, {}
    for name, policy in (
        ("k=1", StaticPolicy(0)),
        ("k=4", StaticPolicy(2)),
        ("slack", SlackPolicy()),
        ("backlog", BacklogPolicy()),
    ):
        found = simulate(arrivals, _scheduler(policy, refuse_late=False))
        assert None not in found.latencies_ms
        within[name], lost[name] = found.within(500), found.mean_loss(LOSSES)
    assert within["backlog"] > 0.995
    assert within["k=1"] < 0.8
    assert within["k=1"] < within["slack"] < within["backlog"]
    assert 0 < lost["backlog"] < 0.5 * lost["k=4"]


def test_batches_are_short_so_that_a_burst_can_still_be_met() -> None:
    """A burst that arrives while a batch runs waits for its end."""
    scheduler = _scheduler(StaticPolicy(0), max_batch_tokens=8192)
    scheduler.submit([300] * 12, 0.0)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    per_row = scheduler.cost.batch_ms(batch.variant.name, 1, 300)
    assert 0.2 * 500 - per_row < batch.expected_ms <= 0.2 * 500
    alone = _scheduler(StaticPolicy(0), goal_ms=20, refuse_late=False)
    alone.submit([512] * 3, 0.0)
    found = alone.next_batch(0.0)
    assert found is not None
    assert len(found.rows) == 1, "one row runs however long it takes"


def test_an_idle_server_loses_nothing() -> None:
    found = simulate([Arrival(1000.0 * index, 200) for index in range(20)], _scheduler())
    assert found.levels == [0] * 20
    assert found.mean_loss(LOSSES) == 0


# What is accepted.


def test_what_is_accepted_under_overload_is_answered_in_time() -> None:
    arrivals = _arrivals(3.0)
    found = simulate(arrivals, _scheduler())
    answered = [ms for ms in found.latencies_ms if ms is not None]
    assert 0.1 < found.refused < 0.5
    assert np.mean(np.array(answered) > 500) < 0.01
    assert np.percentile(answered, 50) > 250  # not by refusing more than it must


def test_a_full_queue_refuses_and_says_when_to_return() -> None:
    scheduler = _scheduler(max_queue_rows=5, refuse_late=False)
    scheduler.submit([10] * 5, 0.0)
    with pytest.raises(Refused) as refused:
        scheduler.submit([10], 0.0)
    assert refused.value.reason == "full"
    late = _scheduler(goal_ms=30)
    late.submit([512], 0.0)
    with pytest.raises(Refused) as refused:
        late.submit([512], 0.0)
    assert refused.value.reason == "late"
    assert 0 < refused.value.retry_after_ms < 30


def test_a_text_that_is_too_slow_for_the_goal_is_accepted_by_an_idle_server() -> None:
    scheduler = _scheduler(goal_ms=5)
    scheduler.submit([512], 0.0)
    with pytest.raises(Refused):
        scheduler.submit([512], 0.0)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_a_large_request_beside_others(load: float) -> None:
    """It neither makes them late nor starves, and at a low load it loses nothing."""
    scheduler = _scheduler(goal_ms=200)
    scheduler.submit([128] * 1000, 0.0, payloads=["large"] * 1000)
    rng = random.Random(0)
    mean = CostModel(TERMS).batch_ms("ratio-8", 1, 128)
    now, upcoming = 0.0, 0.0
    answered = late = refused = 0
    done_at = None
    large = 1000
    while large or now < 20_000:
        while upcoming <= now:
            try:
                scheduler.submit([128], now, arrived_ms=upcoming, payloads=["usual"])
            except Refused:
                refused += 1
            upcoming += rng.expovariate(load / mean)
        batch = scheduler.next_batch(now)
        if batch is None:
            now = upcoming
            continue
        now += batch.expected_ms
        scheduler.finished(batch, now)
        for row in batch.rows:
            if row.payload == "usual":
                answered += 1
                late += now - row.arrived_ms > 200
            else:
                large -= 1
        if not large and done_at is None:
            done_at = now
    assert late <= 0.01 * answered
    assert refused <= 0.02 * answered
    alone = CostModel(TERMS).work_ms("ratio-8", 125, 128_000, 1000 * 128**2)
    assert done_at is not None
    assert done_at < 4 * alone * 1.1


def test_a_request_behind_a_large_one_is_accepted() -> None:
    scheduler = _scheduler(goal_ms=200)
    scheduler.submit([128] * 2000, 0.0)
    for count in (1, 10, 34, 40, 100):
        scheduler.submit([128] * count, 1.0)


def test_the_time_before_a_request_could_wait_counts() -> None:
    scheduler = _scheduler(goal_ms=200)
    scheduler.submit([128], 1000.0, arrived_ms=900.0)
    with pytest.raises(Refused):
        scheduler.submit([128], 1000.0, arrived_ms=790.0)


def test_a_large_request_does_not_keep_others_from_their_goal() -> None:
    scheduler = _scheduler()
    scheduler.submit([256] * 400, 0.0, payloads=["bulk"] * 400)
    now, levels = 0.0, []
    late = bulk = 0
    for step in range(200):
        if step % 4 == 0:
            scheduler.submit([128], now, payloads=["single"])
        batch = scheduler.next_batch(now)
        if batch is None:
            break
        now += batch.expected_ms
        scheduler.finished(batch, now)
        for row in batch.rows:
            late += row.payload == "single" and now - row.arrived_ms > 500
            bulk += row.payload == "bulk"
        levels.append(batch.variant.ratio)
    assert not late
    assert bulk == 400  # and it is not starved
    assert np.mean([level == 1 for level in levels]) > 0.9  # there is time: nothing is lost for it


def test_a_large_request_of_no_tokens_runs() -> None:
    scheduler = _scheduler()
    scheduler.submit([0, 0, 50], 0.0)
    rows = 0
    while (batch := scheduler.next_batch(0.0)) is not None:
        rows += len(batch.rows)
    assert rows == 3


def test_pinned_and_bounded_rows_keep_their_levels_beside_others() -> None:
    scheduler = _scheduler(StaticPolicy(3), refuse_late=False)
    for index in range(40):
        allowed = [(0,), (0, 1), None, (2,)][index % 4]
        scheduler.submit([100], float(index), allowed=allowed, payloads=[allowed])
    while (batch := scheduler.next_batch(100.0)) is not None:
        level = VARIANTS.all.index(batch.variant)
        for row in batch.rows:
            assert level == {None: 3, (0,): 0, (0, 1): 1, (2,): 2}[row.payload]
        scheduler.finished(batch, 100.0)


def test_cancelled_rows_do_not_run() -> None:
    scheduler = _scheduler()
    kept, gone = scheduler.submit([10], 0.0), scheduler.submit([10, 11], 0.0)
    assert scheduler.cancel(gone) == 2
    batch = scheduler.next_batch(1.0)
    assert batch is not None
    assert list(batch.rows) == kept
    assert scheduler.next_batch(2.0) is None


def test_choosing_does_not_look_at_all_that_waits() -> None:
    scheduler = _scheduler(refuse_late=False)
    rng = random.Random(1)
    for _ in range(5000):
        scheduler.submit([rng.randint(5, 512)], 0.0, allowed=rng.choice([None, (0, 1), (3,)]))
    times = []
    for _ in range(50):
        started = time.perf_counter()
        batch = scheduler.next_batch(1.0)
        times.append(time.perf_counter() - started)
        assert batch is not None
        scheduler.finished(batch, 1.0, counts=False)
    # 0.2 ms on a quiet machine. A choice that looks at all 5000 rows takes some 20 ms.
    assert np.median(times) < 5e-3


# The service: the same on a thread.


class _Runner:
    """Rows answer with their own first id. Ids from 900 on make the runtime fail."""

    def __init__(self) -> None:
        self.variants, self.cost = VARIANTS, CostModel(TERMS)
        self.go = threading.Event()
        self.go.set()
        self.started = threading.Event()
        self.broken = False

    def run(self, rows: Sequence[TokenRow], variant: ServedVariant) -> list[Arrays]:
        self.started.set()
        assert self.go.wait(10)
        if self.broken or any(row.ids[0] >= 900 for row in rows):
            raise RuntimeError("CUDA error: an illegal memory access")
        return [{"y": np.array([row.ids[0], variant.ratio])} for row in rows]

    def probe(self) -> None:
        self.run([_row(0)], VARIANTS.all[0])


def _row(value: int, length: int = 4) -> TokenRow:
    return TokenRow([value] * length, [0] * length)


def _service(runner: _Runner, policy: RatioPolicy | None = None, **limits: object) -> Service:
    return Service(runner, policy or StaticPolicy(0), Limits(1e6, **limits))  # type: ignore[arg-type]


def test_answers_of_many_threads_are_not_mixed_up() -> None:
    runner = _Runner()
    service = _service(runner, max_batch_rows=7)
    wrong: list[object] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            values = [rng.randint(0, 800) for _ in range(rng.randint(1, 5))]
            level = rng.choice([0, 1, 2, 3])
            answer = service.submit([_row(v, 3 + v % 40) for v in values], allowed=(level,)).result(10)
            expected = [[v, VARIANTS.all[level].ratio] for v in values]
            if [list(found["y"]) for found in answer.outputs] != expected or len(answer.ratios) != 1:
                wrong.append((values, answer))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    service.close()
    assert not wrong


def test_only_the_request_whose_text_the_runtime_fails_at_gets_the_error() -> None:
    runner = _Runner()
    runner.go.clear()
    service = _service(runner)
    first = service.submit([_row(1)])
    assert runner.started.wait(5)
    good, bad, also = (service.submit([_row(v)]) for v in (2, 900, 3))
    runner.go.set()
    assert first.result(5).outputs[0]["y"][0] == 1
    assert [future.result(5).outputs[0]["y"][0] for future in (good, also)] == [2, 3]
    with pytest.raises(RowFailed, match="failed at text 1: CUDA error"):
        bad.result(5)
    for _ in range(5):
        with pytest.raises(RowFailed):
            service.submit([_row(901)]).result(5)
    assert service.healthy, "the text is to blame, not the runtime"
    runner.broken = True
    with pytest.raises(RowFailed):
        service.submit([_row(1)]).result(5)
    _until(lambda: not service.healthy)
    runner.broken = False
    service.submit([_row(1)]).result(5)
    _until(lambda: service.healthy)
    service.close()


def _until(met: Callable[[], bool]) -> None:
    ends = time.monotonic() + 5
    while not met():
        assert time.monotonic() < ends
        time.sleep(0.001)


def test_a_listener_that_fails_costs_no_answer() -> None:
    class Broken(Listener):
        def batch_done(self, batch: Batch, ms: float, choosing_ms: float) -> None:
            raise ZeroDivisionError((batch, ms, choosing_ms))

    service = Service(_Runner(), StaticPolicy(0), Limits(1e6), Broken())
    assert service.submit([_row(7)]).result(5).outputs[0]["y"][0] == 7
    _until(lambda: not service.healthy)


def test_a_batch_is_counted_before_its_answers_are_given() -> None:
    counted: list[bool] = []
    runner = _Runner()
    runner.go.clear()

    class Watching(Listener):
        def batch_done(self, batch: Batch, *_: float) -> None:
            counted.append(any(row.payload.request.future.done() for row in batch.rows))

    service = Service(runner, StaticPolicy(0), Limits(1e6), Watching())
    future = service.submit([_row(7)])
    runner.go.set()
    future.result(5)
    assert counted == [False]
    service.close()


def test_closing_answers_what_was_accepted_and_takes_no_more() -> None:
    runner = _Runner()
    runner.go.clear()
    service = _service(runner, max_batch_rows=1)
    futures = [service.submit([_row(v)]) for v in range(5)]
    closing = threading.Thread(target=service.close)
    closing.start()
    _until(lambda: service._closing)
    with pytest.raises(Closed):
        service.submit([_row(9)])
    runner.go.set()
    closing.join(5)
    assert [future.result(0).outputs[0]["y"][0] for future in futures] == [0, 1, 2, 3, 4]


def test_giving_up_fails_what_waits() -> None:
    runner = _Runner()
    runner.go.clear()
    service = _service(runner, max_batch_rows=1)
    futures = [service.submit([_row(v)]) for v in range(3)]
    service.close(timeout_s=0)
    for future in futures:
        with pytest.raises(Closed, match="stopped before"):
            future.result(5)
    runner.go.set()


def test_a_cancelled_request_leaves_the_queue() -> None:
    runner = _Runner()
    runner.go.clear()
    service = _service(runner, max_batch_rows=1)
    service.submit([_row(0)])
    assert runner.started.wait(5)
    waits = service.submit([_row(1), _row(2)])
    assert service.waiting().rows == 2
    assert waits.cancel()
    assert service.waiting().rows == 0
    with pytest.raises(CancelledError):
        waits.result(0)
    runner.go.set()
    service.close()


def test_a_fault_in_the_policy_leaves_nobody_waiting() -> None:
    class Broken:
        def choose(self, queue: QueueState) -> int:
            raise ZeroDivisionError(len(queue.options))

    service = _service(_Runner(), Broken())
    with pytest.raises(ZeroDivisionError):
        service.submit([_row(0)]).result(5)
    assert not service.healthy
    with pytest.raises(Closed):
        service.submit([_row(0)])


def test_a_clock_that_is_set_back_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hours = itertools.count(10, -1)
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    service = _service(_Runner())
    answer = service.submit([_row(5)]).result(5)
    assert answer == Answer(answer.outputs, [VARIANTS.all[0]])
    service.close()


def test_a_measured_duration_corrects_the_costs() -> None:
    scheduler = _scheduler()
    for step in range(100):
        scheduler.submit([128], 1000.0 * step)
        batch = scheduler.next_batch(1000.0 * step)
        assert batch is not None
        scheduler.finished(batch, 1000.0 * step + 2 * TERMS["ratio-1"].ms(1, 128, 128**2))
    assert scheduler.cost.batch_ms("ratio-1", 1, 128) == pytest.approx(
        2 * TERMS["ratio-1"].ms(1, 128, 128**2), rel=0.05
    )
