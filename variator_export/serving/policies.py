"""Policies: which variant the next batch runs with.

The names and the idea of the slack follow SuperServe (arXiv 2312.16733), whose SlackFit takes the best model
that answers the first request in time. The backlog policy also looks at all that waits behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from variator_export.core.errors import UserError

# The share of the time to the deadlines that waiting rows may need: the other half is for rows that arrive
# meanwhile.
_SHARE = 0.5
# How much less than the limit a better variant must need before the policy returns to it.
_MARGIN = 0.15


@dataclass(frozen=True)
class Option:
    """What a variant would make of the queue.

    Attributes:
        batch_ms: The expected duration of the next batch.
        pressure: The expected time for all that waits, over the time to its deadlines. Above 1, something
            will be late.
    """

    batch_ms: float
    pressure: float


@dataclass(frozen=True)
class QueueState:
    """What a policy sees.

    Attributes:
        options: An option for each level, the best quality first.
        slack_ms: The time to the deadline of the row that must run next. Negative if it is late.
        goal_ms: The latency goal.
    """

    options: Sequence[Option]
    slack_ms: float
    goal_ms: float


class RatioPolicy(Protocol):
    """A policy. One's own needs this one method, and may keep a state: one policy serves one queue."""

    def choose(self, queue: QueueState) -> int:
        """The level to run: an index into the options, of which the last is the fastest."""
        ...


class StaticPolicy:
    """Always the same level.

    Args:
        level: The level; 0 is the best quality.
    """

    def __init__(self, level: int = 0) -> None:
        self._level = level

    def choose(self, queue: QueueState) -> int:
        """The level, or the fastest one if there are not so many."""
        return min(self._level, len(queue.options) - 1)


class SlackPolicy:
    """The best quality whose next batch is done before the deadline of its first row."""

    def choose(self, queue: QueueState) -> int:
        """The best quality that is in time. The fastest if none is."""
        fastest = len(queue.options) - 1
        return next(
            (level for level, option in enumerate(queue.options) if option.batch_ms <= queue.slack_ms),
            fastest,
        )


class BacklogPolicy:
    """The best quality that is in time, and that drains the queue in a share of the time to its deadlines.

    To a better quality the policy returns only when that one needs `margin` less than the share, so that a
    steady load does not change the ratio with every batch.

    Args:
        share: The share of the time to the deadlines that all that waits may need.
        margin: The share of this limit that must be left for a return to a better quality.
    """

    def __init__(self, share: float = _SHARE, margin: float = _MARGIN) -> None:
        if not 0 < share <= 1 or not 0 <= margin < 1:
            raise ValueError(f"share {share} must be in (0, 1] and margin {margin} in [0, 1)")
        self._share, self._margin = share, margin
        self._last = 0

    def choose(self, queue: QueueState) -> int:
        """The best quality that meets the rule. The fastest if none does."""
        self._last = next(
            (level for level, option in enumerate(queue.options) if self._meets(level, option, queue)),
            len(queue.options) - 1,
        )
        return self._last

    def _meets(self, level: int, option: Option, queue: QueueState) -> bool:
        share = self._share * (1 - self._margin) if level < self._last else self._share
        return option.pressure <= share and option.batch_ms <= queue.slack_ms


POLICIES = ("backlog", "slack", "static")


def make_policy(name: str, level: int = 0) -> RatioPolicy:
    """A policy by its name.

    Args:
        name: `backlog`, `slack` or `static`.
        level: The level of `static`.

    Raises:
        UserError: There is no such policy.
    """
    if name == "backlog":
        return BacklogPolicy()
    if name == "slack":
        return SlackPolicy()
    if name == "static":
        return StaticPolicy(level)
    raise UserError(f"There is no policy {name!r}.", f"Choose one of: {', '.join(POLICIES)}.")
