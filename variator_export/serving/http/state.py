"""The server's state: the model that answers now, and its replacement without losing a request."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from variator_export.serving.batcher import Load
from variator_export.serving.http.metrics import Metrics
from variator_export.serving.http.settings import ServerSettings
from variator_export.serving.model import ServedModel
from variator_export.serving.policies import make_policy
from variator_export.serving.service import Service

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(eq=False)
class Live:
    """A model and the service that runs it.

    Attributes:
        model: The model.
        service: The service.
        allowed: The levels of requests that ask for nothing. None for all that are automatic.
        calls: The number of requests that use it.
        unused: Set when it was replaced and the last of them is done.
    """

    model: ServedModel
    service: Service
    allowed: tuple[int, ...] | None
    calls: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)


class ServerState:
    """The model that answers requests.

    Args:
        model: The first model.
        settings: The server's settings.
        open_again: Opens the bundle again, for SIGHUP.
    """

    def __init__(
        self, model: ServedModel, settings: ServerSettings, open_again: Callable[[], ServedModel]
    ) -> None:
        self.settings = settings
        self._open_again = open_again
        self.metrics = Metrics(settings.goal_ms, self.waiting)
        self.ready, self.gave_up = True, False
        self._tokenizers = ThreadPoolExecutor(settings.tokenizer_threads, "variator-tokenizer")
        self._reloading = asyncio.Lock()
        self.now = self._live(model)

    def _live(self, model: ServedModel) -> Live:
        settings = self.settings
        level = 0 if settings.static_variant is None else model.variants.named(settings.static_variant)[0]
        self.metrics.offer(model.variants)
        limits = settings.limits(model.max_batch_tokens)
        service = Service(model, make_policy(settings.policy, level), limits, self.metrics)
        return Live(model, service, (level,) if settings.policy == "static" else None)

    @property
    def model_name(self) -> str:
        """The name that requests use for the model."""
        return self.settings.model_name or self.now.model.name

    def waiting(self) -> Load:
        """The rows that wait."""
        return self.now.service.waiting()

    async def in_thread(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        """Run work on a thread for tokenising, beside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizers, functools.partial(work, *arguments))

    async def run(self, small: bool, work: Callable[..., _Result], *arguments: object) -> _Result:
        """Run work here if it is small, so that handing it over would take longer; else on a thread."""
        return work(*arguments) if small else await self.in_thread(work, *arguments)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Live]:
        """The model that answers now, which stays open for this call if it is replaced meanwhile."""
        live = self.now
        live.calls += 1
        try:
            yield live
        finally:
            live.calls -= 1
            if not live.calls and live is not self.now:
                live.unused.set()

    async def reload(self) -> None:
        """Open the bundle again and let it take over. If it cannot be opened, the present one stays."""
        async with self._reloading:
            loop = asyncio.get_running_loop()
            try:
                model = await loop.run_in_executor(None, self._open_again)
                opened = self._live(model)
            except Exception as error:
                _LOG.error("The bundle was not taken over; the present one goes on: %s", error)
                return
            old, self.now = self.now, opened
            self.metrics.reloaded()
            _LOG.warning("The bundle was taken over: %s", model.bundle.path)
            if old.calls:
                await old.unused.wait()
            await loop.run_in_executor(None, old.service.close)

    def give_up(self) -> None:
        """Answer what waits with an error."""
        self.ready, self.gave_up = False, True
        self.now.service.close(timeout_s=0)

    def close(self) -> None:
        """Answer what was accepted, and stop."""
        self.ready = False
        self.now.service.close()
        self._tokenizers.shutdown(cancel_futures=True)
