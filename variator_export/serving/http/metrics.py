"""Prometheus metrics, in a registry of the server's own."""

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from variator_export.serving.batcher import Load
from variator_export.serving.http.live import LiveRecord
from variator_export.serving.scheduler import Batch
from variator_export.serving.service import Answer, Listener
from variator_export.serving.variants import Variants

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_CHOOSING = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics(Listener):
    """What `/metrics` and the live page show.

    Args:
        goal_ms: The latency goal in milliseconds.
        waiting: The rows that wait now.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(
        self, goal_ms: float, waiting: Callable[[], Load], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.registry = CollectorRegistry()
        self.live = LiveRecord(goal_ms, clock)
        self._waiting, self._goal_ms = waiting, goal_ms
        make: dict[str, Any] = {"registry": self.registry}
        self._queue_rows = Gauge("variator_queue_rows", "Texts that wait.", **make)
        self._queue_tokens = Gauge("variator_queue_tokens", "Tokens of the texts that wait.", **make)
        self._goal = Gauge("variator_latency_goal_seconds", "The latency goal of a request.", **make)
        self._goal.set(goal_ms / 1e3)
        self._requests = Counter(
            "variator_requests", "Requests that were answered.", ["endpoint", "status"], **make
        )
        self._within = Counter(
            "variator_requests_within_goal",
            "Requests that were answered with success within the goal.",
            **make,
        )
        self._duration = Histogram(
            "variator_request_duration_seconds",
            "Time from the arrival of a request to its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            **make,
        )
        self._batch_duration = Histogram(
            "variator_batch_duration_seconds",
            "Time of a batch in the runtime.",
            ["ratio"],
            buckets=_SECONDS,
            **make,
        )
        self._batch_rows = Histogram("variator_batch_rows", "Texts in a batch.", buckets=_ROWS, **make)
        self._batch_tokens = Histogram(
            "variator_batch_tokens", "Padded tokens in a batch.", buckets=_TOKENS, **make
        )
        self._choosing = Histogram(
            "variator_choosing_seconds",
            "Time to choose a batch and its ratio.",
            buckets=_CHOOSING,
            **make,
        )
        self._tokens = Counter("variator_tokens", "Tokens of texts that ran, without padding.", **make)
        self._selected = Counter(
            "variator_ratio_selected", "Texts by the ratio that they ran with.", ["ratio"], **make
        )
        self._lost = Counter(
            "variator_expected_loss",
            "Sum over texts of what their ratio loses, as a share of the metric; divide its rate by that of "
            "variator_ratio_selected_total. Only of texts whose loss is known.",
            **make,
        )
        self._refused = Counter(
            "variator_refused", "Requests that were refused, by reason.", ["reason"], **make
        )
        self._cancelled = Counter("variator_cancelled", "Requests whose client hung up.", **make)
        self._reloads = Counter("variator_reloads", "Bundles that were taken over by SIGHUP.", **make)
        for reason in ("late", "full"):
            self._refused.labels(reason)

    def offer(self, variants: Variants) -> None:
        """Let the ratios of a model appear, with 0 texts."""
        for variant in variants.all:
            self._selected.labels(str(variant.label))
        self.live.offer(variants)

    def batch_done(self, batch: Batch, ms: float, choosing_ms: float) -> None:
        """Count a batch."""
        ratio = str(batch.variant.label)
        tokens = sum(row.length for row in batch.rows)
        self._batch_duration.labels(ratio).observe(ms / 1e3)
        self._batch_rows.observe(len(batch.rows))
        self._batch_tokens.observe(batch.length * len(batch.rows))
        self._choosing.observe(choosing_ms / 1e3)
        self._tokens.inc(tokens)
        self._selected.labels(ratio).inc(len(batch.rows))
        if batch.variant.loss is not None:
            self._lost.inc(batch.variant.loss * len(batch.rows))
        self.live.batch(batch.variant, len(batch.rows), tokens, ms)

    def request_done(self, endpoint: str, status: int, ms: float, answer: Answer | None) -> None:
        """Count a request that was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        if answer is None:
            return
        self._duration.labels(endpoint).observe(ms / 1e3)
        if ms <= self._goal_ms:
            self._within.inc()
        self.live.request(ms)

    def refused(self, reason: str) -> None:
        """Count a request that was refused."""
        self._refused.labels(reason).inc()
        self.live.refused()

    def cancelled(self) -> None:
        """Count a request whose client hung up."""
        self._cancelled.inc()

    def reloaded(self) -> None:
        """Count a bundle that was taken over."""
        self._reloads.inc()

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        load = self._waiting()
        self._queue_rows.set(load.rows)
        self._queue_tokens.set(load.tokens)
        return generate_latest(self.registry)
