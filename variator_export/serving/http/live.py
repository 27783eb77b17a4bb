"""What the live page shows: the last minutes, second by second."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from variator_export.serving.variants import ServedVariant, Variants

_SECONDS = 300


@dataclass
class _Second:
    """What happened within a second."""

    at: int
    latencies_ms: list[float] = field(default_factory=list)
    texts_by_ratio: dict[int | str, int] = field(default_factory=dict)
    lost: float = 0.0
    texts: int = 0
    tokens: int = 0
    busy_ms: float = 0.0
    refused: int = 0


class LiveRecord:
    """Counts of the last five minutes. Threads may share one.

    Args:
        goal_ms: The latency goal in milliseconds.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(self, goal_ms: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._goal_ms, self._clock, self._started = goal_ms, clock, clock()
        self._seconds: deque[_Second] = deque(maxlen=_SECONDS)
        self._lock = threading.Lock()
        self._variants: Variants | None = None

    def offer(self, variants: Variants) -> None:
        """Name the variants of a model."""
        self._variants = variants

    def batch(self, variant: ServedVariant, texts: int, tokens: int, ms: float) -> None:
        """Count a batch."""
        with self._lock:
            now = self._now()
            now.texts_by_ratio[variant.label] = now.texts_by_ratio.get(variant.label, 0) + texts
            now.lost += (variant.loss or 0.0) * texts
            now.texts, now.tokens, now.busy_ms = now.texts + texts, now.tokens + tokens, now.busy_ms + ms

    def request(self, ms: float) -> None:
        """Count a request and its latency."""
        with self._lock:
            self._now().latencies_ms.append(ms)

    def refused(self) -> None:
        """Count a request that was refused."""
        with self._lock:
            self._now().refused += 1

    def document(self, queue_rows: int, since: int = 0) -> dict[str, Any]:
        """The last five minutes, for the page.

        Args:
            queue_rows: The number of texts that wait.
            since: The first second that is wanted, since the server's start.
        """
        with self._lock:
            self._now()
            seconds = [self._summary(second) for second in self._seconds if second.at >= since]
        variants = [v for v in self._variants.all if v.automatic] if self._variants is not None else []
        return {
            "goal_ms": self._goal_ms,
            "now": int(self._clock() - self._started),
            "queue": queue_rows,
            "ratios": [v.label for v in variants],
            "losses": [v.loss for v in variants],
            "metric": self._variants.metric if self._variants is not None else None,
            "seconds": seconds,
        }

    def _now(self) -> _Second:
        at = int(self._clock() - self._started)
        if not self._seconds or self._seconds[-1].at != at:
            self._seconds.append(_Second(at))
        return self._seconds[-1]

    def _summary(self, second: _Second) -> dict[str, Any]:
        latencies = np.array(second.latencies_ms)
        return {
            "at": second.at,
            "requests": len(latencies),
            "within": int((latencies <= self._goal_ms).sum()),
            "p50": float(np.percentile(latencies, 50)) if len(latencies) else None,
            "p99": float(np.percentile(latencies, 99)) if len(latencies) else None,
            "texts": second.texts,
            "tokens": second.tokens,
            "busy": second.busy_ms / 1e3,
            "refused": second.refused,
            "ratios": {str(ratio): texts for ratio, texts in second.texts_by_ratio.items()},
            "lost": second.lost / second.texts if second.texts else None,
        }
