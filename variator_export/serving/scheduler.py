"""The queue of a server: what is accepted, what runs next, and at which ratio.

Times are milliseconds of a clock that never goes back, and come in as arguments. A scheduler is not
thread-safe; `Service` holds a lock around it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from variator_export.serving.batcher import Batcher, Load, Row
from variator_export.serving.cost_model import CostModel, Measurement
from variator_export.serving.policies import Option, QueueState, RatioPolicy
from variator_export.serving.variants import ServedVariant, Variants, level_of

# A request of several texts that alone needs more than a quarter of the goal cannot meet it beside others.
# Large requests wait in a lane of their own, which is sure of a quarter of the time, and get four times what
# they need.
_LARGE_SHARE = 0.25
# A request is accepted if it is expected to be done in this share of its goal; the rest is for surprises.
_ADMITTED_SHARE = 0.9
# How fast the expected share of padding follows the batches.
_PADDING_SHARE = 0.02
# The share of the goal that a batch may take. What arrives while a batch runs waits for its end, and a batch
# may take longer than expected. Without this limit one request in 25 was refused at 85 % of what ratio 1
# carries, on a machine that stands still now and then.
_BATCH_SHARE = 0.2


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A request is not accepted.

    Attributes:
        reason: `late` if it could not meet its goal, `full` if the queue is full.
        retry_after_ms: The time after which it may be accepted.
    """

    def __init__(self, reason: str, retry_after_ms: float) -> None:
        super().__init__(reason)
        self.reason, self.retry_after_ms = reason, retry_after_ms


@dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        rows: The rows.
        variant: The variant that they run with.
        length: The length of the longest row in tokens.
        expected_ms: The expected duration in milliseconds.
        started_ms: The time of its start.
    """

    rows: Sequence[Row]
    variant: ServedVariant
    length: int
    expected_ms: float
    started_ms: float


@dataclass(frozen=True)
class Limits:
    """The limits of a queue.

    Attributes:
        goal_ms: The latency goal of a request in milliseconds, from its arrival to its answer.
        max_batch_tokens: The largest number of padded tokens in a batch.
        max_batch_rows: The largest number of rows in a batch.
        max_queue_rows: The largest number of rows that wait.
        refuse_late: Whether a request is refused that could not meet its goal any more.
    """

    goal_ms: float
    max_batch_tokens: int = 2048
    max_batch_rows: int = 64
    max_queue_rows: int = 20_000
    refuse_late: bool = True


class Scheduler:
    """Decides for one session that runs one batch at a time."""

    def __init__(self, variants: Variants, cost: CostModel, policy: RatioPolicy, limits: Limits) -> None:
        self.variants, self.cost, self.policy, self.limits = variants, cost, policy, limits
        self._usual = Batcher(limits.max_batch_tokens, limits.max_batch_rows)
        self._large = Batcher(limits.max_batch_tokens, limits.max_batch_rows)
        self._running: Batch | None = None
        # The time that large requests have been kept waiting for beyond their share, in milliseconds.
        self._owed_ms = 0.0
        # Padded tokens for each token, in the batches of late.
        self._padding = 1.0

    def __len__(self) -> int:
        return len(self._usual) + len(self._large)

    def waiting(self) -> Load:
        """The rows that wait."""
        usual, large = self._usual.total(), self._large.total()
        return Load(usual.rows + large.rows, usual.tokens + large.tokens, usual.pairs + large.pairs)

    def everything(self) -> list[Row]:
        """The rows that wait, and those that run."""
        return [*self._usual, *self._large, *(self._running.rows if self._running is not None else ())]

    def submit(
        self,
        lengths: Sequence[int],
        now_ms: float,
        *,
        arrived_ms: float | None = None,
        allowed: Sequence[int] | None = None,
        payloads: Sequence[Any] | None = None,
    ) -> list[Row]:
        """Accept the rows of one request.

        Args:
            lengths: The number of tokens of each row.
            now_ms: The time.
            arrived_ms: The time from which the goal counts. None for now.
            allowed: The levels that the request allows, ascending. None for all that are automatic.
            payloads: What the caller needs of each row.

        Raises:
            Refused: The request could not meet its goal, or the queue is full.
        """
        levels = tuple(allowed) if allowed is not None else self.variants.automatic
        arrived = now_ms if arrived_ms is None else arrived_ms
        own = Load()
        rows = [Row(max(length, 1), levels, arrived, arrived) for length in lengths]
        for row in rows:
            own.add(row)
        own_ms = self._work_ms(own, levels[-1])
        goal_ms = self.limits.goal_ms
        large = len(rows) > 1 and own_ms > _LARGE_SHARE * goal_ms
        if len(self) + len(rows) > self.limits.max_queue_rows:
            raise Refused("full", self._queued_ms(self._usual, self.variants.automatic[-1]))
        if large:
            goal_ms = own_ms / _LARGE_SHARE
        elif self.limits.refuse_late:
            self._refuse_late(rows, own_ms, now_ms)
        lane = self._large if large else self._usual
        for row, payload in zip(rows, payloads or [None] * len(rows), strict=True):
            row.deadline_ms, row.payload = arrived + goal_ms, payload
            lane.add(row)
        return rows

    def cancel(self, rows: Sequence[Row]) -> int:
        """Take rows out that still wait, because nobody waits for them. Returns how many did."""
        return sum(self._usual.discard(row) or self._large.discard(row) for row in rows)

    def next_batch(self, now_ms: float) -> Batch | None:
        """Take the next batch out of the queue. None if no row waits."""
        lane = self._lane()
        head = lane.head()
        if head is None:
            return None
        state, batches = self._state(lane, head, now_ms)
        chosen = self.policy.choose(state)
        level, rows = level_of(head.allowed, chosen), batches[chosen]
        for row in rows:
            lane.discard(row)
        length = max(row.length for row in rows)
        variant = self.variants.all[level]
        expected = state.options[chosen].batch_ms
        self._settle(lane, expected)
        padding = len(rows) * length / sum(row.length for row in rows)
        self._padding += _PADDING_SHARE * (padding - self._padding)
        self._running = Batch(rows, variant, length, expected, now_ms)
        return self._running

    def finished(self, batch: Batch, now_ms: float, *, counts: bool = True) -> None:
        """Note that a batch is done.

        Args:
            batch: The batch.
            now_ms: The time.
            counts: Whether its duration says something about the next one of its kind.
        """
        self._running = None
        if counts:
            ms = now_ms - batch.started_ms
            self.cost.observe(Measurement(batch.variant.name, len(batch.rows), batch.length, ms))

    def _lane(self) -> Batcher:
        """The lane whose turn it is.

        Large requests run when nothing else waits, or when time is owed to them.
        """
        if not len(self._large):
            self._owed_ms = 0.0
            return self._usual
        return self._usual if len(self._usual) and self._owed_ms <= 0 else self._large

    def _settle(self, lane: Batcher, ms: float) -> None:
        """Keep account of the time that large requests are owed while both lanes wait."""
        if lane is self._usual and len(self._large):
            self._owed_ms += ms * _LARGE_SHARE / (1 - _LARGE_SHARE)
        elif lane is self._large:
            self._owed_ms = self._owed_ms - ms if len(self._usual) else 0.0

    def _state(self, lane: Batcher, head: Row, now_ms: float) -> tuple[QueueState, list[list[Row]]]:
        """What the policy sees, and the rows of the next batch by the level that it chooses."""
        time_ms = self._time_ms(lane, now_ms)
        options: list[Option] = []
        batches: list[list[Row]] = []
        for level in range(len(self.variants.all)):
            runs_at = level_of(head.allowed, level)
            name = self.variants.all[runs_at].name
            rows = lane.peek(
                functools.partial(_runs_at, level, runs_at), functools.partial(self._in_time, name)
            )
            batches.append(rows)
            batch_ms = self.cost.batch_ms(name, len(rows), max(row.length for row in rows))
            options.append(Option(batch_ms, self._queued_ms(lane, level) / time_ms))
        return QueueState(options, head.deadline_ms - now_ms, self.limits.goal_ms), batches

    def _time_ms(self, lane: Batcher, now_ms: float) -> float:
        """The time that a lane has for all that waits in it."""
        if lane is self._large:
            left_ms = (lane.last_deadline_ms() or now_ms) - now_ms
            return max(left_ms * (_LARGE_SHARE if len(self._usual) else 1.0), 1.0)
        return self.limits.goal_ms * self._usual_share()

    def _usual_share(self) -> float:
        """The share of the time that usual requests are sure of."""
        return 1 - _LARGE_SHARE if len(self._large) else 1.0

    def _queued_ms(self, lane: Batcher, level: int) -> float:
        """The time for the rows of a lane, each at the level where it would run."""
        return sum(self._work_ms(load, level_of(allowed, level)) for allowed, load in lane.loads())

    def _work_ms(self, load: Load, level: int) -> float:
        """The time for rows that run in full batches, as far as there are enough of them."""
        calls = max(load.tokens / self.limits.max_batch_tokens, load.rows / self.limits.max_batch_rows, 1.0)
        name = self.variants.all[level].name
        ms = self.cost.work_ms(name, calls, load.tokens, load.pairs)
        calls = max(calls, ms / self._longest_batch_ms)
        return self.cost.work_ms(name, calls, load.tokens, load.pairs) * self._padding

    @property
    def _longest_batch_ms(self) -> float:
        """The longest duration of a batch of several rows, so that what arrives meanwhile is in time too."""
        return _BATCH_SHARE * self.limits.goal_ms

    def _in_time(self, name: str, rows: int, length: int) -> bool:
        """Whether a batch of a variant is short enough."""
        return self.cost.batch_ms(name, rows, length) <= self._longest_batch_ms

    def _refuse_late(self, rows: Sequence[Row], own_ms: float, now_ms: float) -> None:
        """Refuse a request that could not meet its goal, even if all that waits ran at the fastest level."""
        waiting_ms = self._queued_ms(self._usual, self.variants.automatic[-1])
        # A row is answered with its batch, in which rows run that came later.
        length = max(row.length for row in rows)
        together = max(min(self.limits.max_batch_tokens // length, self.limits.max_batch_rows), 1)
        fastest = self.variants.all[rows[0].allowed[-1]].name
        longest_ms = max(self._longest_batch_ms, self.cost.batch_ms(fastest, 1, length))
        batch_ms = min(self.cost.batch_ms(fastest, together, length), longest_ms)
        waiting_ms += min(max(batch_ms - own_ms, 0.0), waiting_ms)
        waiting_ms /= self._usual_share()
        if self._running is not None:
            waiting_ms += max(self._running.started_ms + self._running.expected_ms - now_ms, 0.0)
        waiting_ms += now_ms - rows[0].arrived_ms
        # A text that alone takes longer than the goal is late in any case, and accepted if it need not wait.
        allowed_ms = max(_ADMITTED_SHARE * self.limits.goal_ms, own_ms)
        if waiting_ms + own_ms > allowed_ms + 1e-9:
            raise Refused("late", waiting_ms + own_ms - allowed_ms)


def _runs_at(level: int, runs_at: int, row: Row) -> bool:
    """Whether a row runs at a level when the policy chose another."""
    return level_of(row.allowed, level) == runs_at
