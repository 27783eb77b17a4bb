"""Running the application: uvicorn, signals and connections."""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from variator_export.core.errors import UserError
from variator_export.serving.http.app import make_app
from variator_export.serving.http.state import ServerState

_LOG = logging.getLogger(__name__)
# Beside connections: files, the runtime's and the pool's.
_SPARE_FILES = 64
_KEEP_ALIVE_S = 75


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address, and listens only when the server does.

    Args:
        host: The address to listen on.
        port: The port. 0 for one that is free.

    Raises:
        UserError: The address is taken, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise UserError(
            f"The server cannot listen on {host}, port {port}: {error.strerror or error}.",
            "Choose another one with --host and --port.",
        ) from error
    return found


def serve(state: ServerState, bound: socket.socket, *, on_started: Callable[[str], None]) -> bool:
    """Serve until SIGTERM or SIGINT, and answer what was accepted until then.

    A second SIGINT gives up what waits. SIGHUP opens the bundle again.

    Args:
        state: The server's state.
        bound: The socket to listen on (`bind`).
        on_started: Called with the server's address once it listens.

    Returns:
        Whether everything that was accepted was answered.
    """
    settings = state.settings
    _allow_connections(settings.max_connections)
    config = uvicorn.Config(
        make_app(state),
        http=_with_timeout(settings.receive_timeout_s),
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        # Longer than proxies keep a connection, so that none sends a request into one that is being closed.
        timeout_keep_alive=_KEEP_ALIVE_S,
        limit_concurrency=settings.max_connections,
        backlog=min(settings.max_connections, 2048),
    )
    server = _Server(config, state, on_started)
    asyncio.run(server.serve([bound]))
    return not state.gave_up


class _Server(uvicorn.Server):
    """uvicorn's server, which also hears SIGHUP and says when it listens."""

    def __init__(self, config: uvicorn.Config, state: ServerState, on_started: Callable[[str], None]) -> None:
        super().__init__(config)
        self._state, self._on_started = state, on_started
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._on_started(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear signals.

        uvicorn would raise them again at the end, but a stop that was asked for is no failure.
        """
        loop = asyncio.get_running_loop()
        heard = {
            signal.SIGTERM: self._stop,
            signal.SIGINT: self._stop_or_give_up,
            signal.SIGHUP: self._reload,
        }
        for number, act in heard.items():
            loop.add_signal_handler(number, act)
        try:
            yield
        finally:
            for number in heard:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self._state.ready = False
        self.should_exit = True

    def _stop_or_give_up(self) -> None:
        if self.should_exit:
            self._state.give_up()
        self._stop()

    def _reload(self) -> None:
        task = asyncio.ensure_future(self._state.reload())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _with_timeout(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which lets go of clients that do not send or do not read.

    uvicorn waits for ever for the rest of a request's head, and for a client that does not read its answer.
    Some slow clients could then use up all connections, or keep the server from stopping.
    """

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._abort_if_unread()

        def shutdown(self) -> None:
            super().shutdown()
            self._abort_if_unread()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._stalled is None:
                self._stalled = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._timer, self._stalled):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def _wait(self) -> None:
            """Wait for a request, as long as none is being answered."""
            if self._answering():
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
            elif self._timer is None:
                self._timer = self.loop.call_later(seconds, self._close_if_silent)

        def _close_if_silent(self) -> None:
            self._timer = None
            if not self._answering():
                self.transport.close()
                self._abort_if_unread()

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _abort_if_unread(self) -> None:
            """Abort a connection that is being closed, if its client does not read the rest."""
            if self.transport.is_closing() and self._stalled is None:
                self._stalled = self.loop.call_later(seconds, self.transport.abort)

    return TimedProtocol


def _allow_connections(count: int) -> None:
    """Raise the number of files that the process may open, as far as the machine allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _SPARE_FILES
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
        found = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if found < wanted:
            _LOG.warning("%d connections need %d files; this machine allows %d.", count, wanted, found)
