"""A session on a thread of its own, fed in batches by the scheduler."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from variator_export.engines.base import Arrays
from variator_export.serving.batcher import Load, Row
from variator_export.serving.cost_model import CostModel
from variator_export.serving.policies import RatioPolicy
from variator_export.serving.scheduler import Batch, Limits, Scheduler
from variator_export.serving.variants import ServedVariant, Variants
from variator_export.text.tokenizer import TokenRow

_LOG = logging.getLogger(__name__)


class Runner(Protocol):
    """What a service runs: `ServedModel`, or what a test puts in its place."""

    @property
    def variants(self) -> Variants:
        """The variants."""
        ...

    @property
    def cost(self) -> CostModel:
        """The expected times of batches."""
        ...

    def run(self, rows: Sequence[TokenRow], variant: ServedVariant) -> list[Arrays]:
        """Run rows as one batch."""
        ...

    def probe(self) -> None:
        """Run a row that is known to work. Raises what the runtime raises if it is broken."""
        ...


class Listener:
    """Hears what a service does, on the service's thread. This base class ignores it."""

    def batch_done(self, batch: Batch, ms: float, choosing_ms: float) -> None:
        """Called after each batch, with its duration and with the time that choosing it took."""


class RowFailed(Exception):  # noqa: N818 - says of which text, beside the cause
    """The runtime failed at a text of the request."""


class Closed(Exception):  # noqa: N818
    """The service takes no more requests."""


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        outputs: The outputs of each row by name, in the order of the request.
        variants: The variant that each row ran with.
    """

    outputs: Sequence[Arrays]
    variants: Sequence[ServedVariant]

    @property
    def ratios(self) -> list[int | str]:
        """The ratios that rows ran with, ascending, and then the names of assemblies; each once."""
        labels = {variant.label for variant in self.variants}
        return sorted(labels, key=lambda label: (isinstance(label, str), label))


@dataclass(eq=False)
class _Request:
    """A request whose rows wait or run."""

    outputs: list[Arrays | None]
    variants: list[ServedVariant | None]
    future: "Future[Answer]" = field(default_factory=Future)
    rows: Sequence[Row] = ()
    missing: int = 0


@dataclass(frozen=True)
class _Payload:
    request: _Request
    index: int
    tokens: TokenRow


class Service:
    """Runs requests of many threads on one session, batch after batch.

    Args:
        runner: What runs a batch.
        policy: Which variant a batch runs with.
        limits: The limits of the queue.
        listener: Hears of each batch.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        runner: Runner,
        policy: RatioPolicy,
        limits: Limits,
        listener: Listener | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner, self._listener, self._clock = runner, listener or Listener(), clock
        self._scheduler = Scheduler(runner.variants, runner.cost, policy, limits)
        self._changed = threading.Condition()
        self._closing = False
        self._broken = False
        self._thread = threading.Thread(target=self._work, name="variator-batches", daemon=True)
        self._thread.start()

    @property
    def limits(self) -> Limits:
        """The limits of the queue."""
        return self._scheduler.limits

    @property
    def healthy(self) -> bool:
        """Whether the session still answers."""
        return not self._broken and (self._thread.is_alive() or self._closing)

    def now_ms(self) -> float:
        """The service's time in milliseconds."""
        return self._clock() * 1e3

    def waiting(self) -> Load:
        """The rows that wait."""
        with self._changed:
            return self._scheduler.waiting()

    def submit(
        self,
        rows: Sequence[TokenRow],
        *,
        allowed: Sequence[int] | None = None,
        arrived_ms: float | None = None,
    ) -> "Future[Answer]":
        """Let rows run, each in a batch with others.

        Args:
            rows: The rows of one request.
            allowed: The levels that the request allows, ascending. None for all.
            arrived_ms: The time of the request's arrival, from which its goal counts. None for now.

        Returns:
            The answer to come. Cancelling it takes rows that still wait out of the queue. It fails with
            `RowFailed` if the runtime fails at a row.

        Raises:
            Refused: The request could not meet its goal any more, or the queue is full.
            Closed: The service is closing.
        """
        request = _Request([None] * len(rows), [None] * len(rows), missing=len(rows))
        payloads = [_Payload(request, index, row) for index, row in enumerate(rows)]
        lengths = [len(row.ids) for row in rows]
        with self._changed:
            if self._closing:
                raise Closed("The service is closing.")
            request.rows = self._scheduler.submit(
                lengths, self.now_ms(), arrived_ms=arrived_ms, allowed=allowed, payloads=payloads
            )
            self._changed.notify()
        request.future.add_done_callback(lambda future: self._forget(request) if future.cancelled() else None)
        return request.future

    def close(self, timeout_s: float | None = None) -> None:
        """Take no more requests, and wait until all accepted ones are answered.

        Args:
            timeout_s: The longest wait in seconds. What is not answered by then fails with `Closed`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._fail_all(Closed("The server was stopped before this request was answered."))

    def _forget(self, request: _Request) -> None:
        with self._changed:
            self._scheduler.cancel(request.rows)

    def _work(self) -> None:
        try:
            while (found := self._next()) is not None:
                self._run(*found)
        except BaseException as error:  # a bug: nobody may wait for ever
            _LOG.exception("The thread that runs batches ended.")
            self._broken = True
            self._fail_all(error)

    def _next(self) -> tuple[Batch, float] | None:
        with self._changed:
            while True:
                started = time.perf_counter()
                batch = self._scheduler.next_batch(self.now_ms())
                if batch is not None:
                    return batch, (time.perf_counter() - started) * 1e3
                if self._closing:
                    return None
                self._changed.wait()

    def _run(self, batch: Batch, choosing_ms: float) -> None:
        payloads: list[_Payload] = [row.payload for row in batch.rows]
        try:
            outputs: list[Arrays | Exception] = list(
                self._runner.run([payload.tokens for payload in payloads], batch.variant)
            )
        except Exception as error:
            outputs = self._one_by_one(payloads, batch.variant, error)
        failed = sum(isinstance(output, Exception) for output in outputs)
        ended = self.now_ms()
        with self._changed:
            self._scheduler.finished(batch, ended, counts=not failed)
        try:
            # Before the answers: whoever has an answer finds it in the metrics.
            self._listener.batch_done(batch, ended - batch.started_ms, choosing_ms)
        finally:
            for payload, output in zip(payloads, outputs, strict=True):
                self._deliver(payload, output, batch.variant)
        if failed == len(outputs):
            self._probe()
        else:
            self._broken = False

    def _probe(self) -> None:
        """Find out whether the runtime is broken, or only the texts were to blame."""
        try:
            self._runner.probe()
            self._broken = False
        except Exception:
            _LOG.exception("The runtime fails at a row that is known to work.")
            self._broken = True

    def _one_by_one(
        self, payloads: Sequence[_Payload], variant: ServedVariant, error: Exception
    ) -> list[Arrays | Exception]:
        """Run the rows of a batch that failed alone, so that only the row that is to blame fails."""
        if len(payloads) == 1:
            return [error]
        found: list[Arrays | Exception] = []
        for payload in payloads:
            try:
                found += self._runner.run([payload.tokens], variant)
            except Exception as own:
                found.append(own)
        return found

    def _deliver(self, payload: _Payload, output: Arrays | Exception, variant: ServedVariant) -> None:
        request = payload.request
        if isinstance(output, Exception):
            failure = RowFailed(f"The runtime failed at text {payload.index + 1}: {output}")
            failure.__cause__ = output
            self._forget(request)
            _settle(request.future, failure)
            return
        request.outputs[payload.index], request.variants[payload.index] = output, variant
        request.missing -= 1
        if not request.missing:
            answer = Answer(
                [found for found in request.outputs if found is not None],
                [found for found in request.variants if found is not None],
            )
            _settle(request.future, answer)

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            self._closing = True
            rows = self._scheduler.everything()
            self._scheduler.cancel(rows)
        requests = {row.payload.request for row in rows}
        for request in requests:
            _settle(request.future, error)


def _settle(future: "Future[Answer]", outcome: Answer | BaseException) -> None:
    """Give a future its outcome, unless its request was cancelled or failed before."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
