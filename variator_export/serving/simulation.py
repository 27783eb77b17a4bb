"""A queue on a simulated clock: what a policy would have done with a load."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from variator_export.serving.scheduler import Batch, Refused, Scheduler


@dataclass(frozen=True)
class Arrival:
    """A request of one text.

    Attributes:
        at_ms: The time of its arrival.
        length: The number of its tokens.
        allowed: The levels that it allows, ascending. None for all.
    """

    at_ms: float
    length: int
    allowed: tuple[int, ...] | None = None


@dataclass
class Simulation:
    """The outcome of a simulation.

    Attributes:
        latencies_ms: The latency of each request by its index. None if it was refused.
        levels: The level of each request by its index. None if it was refused.
        batches: The batches, in the order in which they ran.
    """

    latencies_ms: list[float | None]
    levels: list[int | None]
    batches: list[Batch] = field(default_factory=list)

    def within(self, goal_ms: float) -> float:
        """The share of all requests that were answered within the goal."""
        return sum(ms is not None and ms <= goal_ms for ms in self.latencies_ms) / len(self.latencies_ms)

    @property
    def refused(self) -> float:
        """The share of all requests that were refused."""
        return sum(ms is None for ms in self.latencies_ms) / len(self.latencies_ms)

    def mean_loss(self, losses: Sequence[float]) -> float:
        """The mean loss of the requests that were answered, from the loss of each level."""
        found = [losses[level] for level in self.levels if level is not None]
        return sum(found) / len(found) if found else 0.0


def simulate(
    arrivals: Sequence[Arrival], scheduler: Scheduler, duration_ms: Callable[[Batch], float] | None = None
) -> Simulation:
    """Let requests arrive, and let one session run the batches that the scheduler gives out.

    Args:
        arrivals: The requests, by time.
        scheduler: A scheduler with an empty queue.
        duration_ms: How long a batch really takes. None for what the scheduler expects.
    """
    found = Simulation([None] * len(arrivals), [None] * len(arrivals))
    upcoming = 0
    now = 0.0
    while True:
        batch = scheduler.next_batch(now)
        if batch is None:
            if upcoming == len(arrivals):
                return found
            now = max(now, arrivals[upcoming].at_ms)
        ends = now if batch is None else now + (duration_ms or (lambda b: b.expected_ms))(batch)
        while upcoming < len(arrivals) and arrivals[upcoming].at_ms <= ends:
            arrival = arrivals[upcoming]
            with contextlib.suppress(Refused):
                scheduler.submit(
                    [arrival.length], arrival.at_ms, allowed=arrival.allowed, payloads=[upcoming]
                )
            upcoming += 1
        now = ends
        if batch is not None:
            scheduler.finished(batch, now)
            found.batches.append(batch)
            for row in batch.rows:
                found.latencies_ms[row.payload] = now - row.arrived_ms
                found.levels[row.payload] = scheduler.variants.all.index(batch.variant)
