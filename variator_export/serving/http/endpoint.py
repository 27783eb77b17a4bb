"""What all endpoints with a body share: the key, the limits, hanging up, errors and metrics."""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from variator_export.core.errors import UserError
from variator_export.core.shares import parse_share
from variator_export.serving.http.body import Fields, receive
from variator_export.serving.http.errors import ApiError, error_response, overloaded
from variator_export.serving.http.settings import LOSS_HEADER, MAX_LOSS_HEADER, RATIO_HEADER
from variator_export.serving.http.state import Live, ServerState
from variator_export.serving.scheduler import Refused
from variator_export.serving.service import Answer, Closed, RowFailed
from variator_export.text.tokenizer import TokenRow

_LOG = logging.getLogger(__name__)
# The status of a request whose client has hung up, in metrics and logs. Nobody receives it.
_HUNG_UP = 499
# A body of so many bytes is parsed in less time than handing it to a thread takes.
_SMALL_BODY = 32 * 1024
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Call:
    """A request to the model.

    Attributes:
        state: The server's state.
        live: The model that answers.
        request: The request.
        body: The body of the request.
        arrived_ms: The time at which the whole request was there, on the service's clock.
    """

    state: ServerState
    live: Live
    request: Request
    body: bytes
    arrived_ms: float

    def fields(self, wrong_status: int) -> Fields:
        """The fields of the body.

        Args:
            wrong_status: The status of the answer if a field is wrong.

        Raises:
            ApiError: The body is not a JSON object.
        """
        settings = self.state.settings
        return Fields(self.body, wrong_status, min(settings.max_texts, settings.max_queue_rows))

    async def parse(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        """Run work on the body: here if the body is small, else on a thread, beside the event loop."""
        return await self.state.run(len(self.body) <= _SMALL_BODY, work, *arguments)

    async def answer(self, rows: Sequence[TokenRow], allowed: Sequence[int] | None) -> Answer:
        """Run rows, and wait for their answer. A call that is cancelled takes its rows out of the queue.

        Raises:
            Refused: The request was not accepted.
            RowFailed: The runtime failed at a row.
        """
        chosen = self.live.allowed if allowed is None else allowed
        return await asyncio.wrap_future(
            self.live.service.submit(rows, allowed=chosen, arrived_ms=self.arrived_ms)
        )

    def allowed(self, pin: str | None) -> tuple[int, ...] | None:
        """The levels that the request allows. None for all.

        Args:
            pin: A variant's name or ratio, from the body. None for the header's, if there is one.

        Raises:
            ApiError: There is no such variant, or none within the loss that is asked for.
        """
        headers = self.request.headers
        variants = self.live.model.variants
        pin = pin if pin is not None else headers.get(RATIO_HEADER)
        bound = headers.get(MAX_LOSS_HEADER)
        try:
            max_loss = None if bound is None else parse_share(bound)
        except ValueError as error:
            raise ApiError(400, f"{MAX_LOSS_HEADER}: {error}.", "invalid_value", MAX_LOSS_HEADER) from error
        try:
            found = None if pin is None else variants.named(pin)
        except UserError as error:
            raise ApiError(404, str(error), "model_not_found", "model") from error
        try:
            within = None if max_loss is None else variants.within(max_loss, found)
        except UserError as error:
            raise ApiError(400, str(error), "invalid_value", MAX_LOSS_HEADER) from error
        return found if within is None else within


@dataclass(frozen=True)
class Reply:
    """A response and the answer that it was made from."""

    response: Response
    answer: Answer | None = None


Handler = Callable[[Call], Awaitable[Reply]]


def endpoint(name: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that runs a handler on the body of a request.

    Args:
        name: The endpoint in the metrics.
        handler: The handler.
    """

    async def run(request: Request) -> Response:
        state: ServerState = request.app.state.server
        started = time.monotonic()
        reply = await _reply(state, request, handler)
        ms = (time.monotonic() - started) * 1e3
        response = reply.response
        if response.status_code == _HUNG_UP:
            state.metrics.cancelled()
        if reply.answer is not None:
            _label(response, reply.answer)
        state.metrics.request_done(name, response.status_code, ms, reply.answer)
        return response

    return run


def check_key(state: ServerState, request: Request) -> None:
    """Check the key of a request, if the server asks for one.

    Raises:
        ApiError: The key is missing or wrong.
    """
    keys = state.settings.api_keys
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Every key is compared, in a time that does not depend on what is right.
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise ApiError(
            401,
            "The API key is missing or wrong: send `Authorization: Bearer KEY`.",
            "invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


async def _reply(state: ServerState, request: Request, handler: Handler) -> Reply:
    """The reply to a request, whatever happens."""
    try:
        check_key(state, request)
        if not state.ready:
            raise ApiError(503, "The server is stopping. Send the request to another one.", "stopping")
        settings = state.settings
        body = await receive(request, settings.max_body_bytes, settings.receive_timeout_s)
        with state.in_use() as live:
            call = Call(state, live, request, body, live.service.now_ms())
            return await _unless_hung_up(request, handler(call))
    except ApiError as error:
        failure = error
    except ClientDisconnect:
        return Reply(Response(status_code=_HUNG_UP))
    except Refused as refused:
        state.metrics.refused(refused.reason)
        failure = overloaded(refused.reason, refused.retry_after_ms)
    except UserError as error:
        wrong = 400 if request.url.path.startswith("/v1/") else 422
        failure = ApiError(wrong, str(error), "invalid_value")
    except Closed:
        failure = ApiError(503, "The server is stopping. Send the request to another one.", "stopping")
    except RowFailed as error:
        _LOG.error("%s", error)
        failure = ApiError(500, str(error), "runtime_error")
    except Exception:
        _LOG.exception("A request failed.")
        failure = ApiError(500, "The server failed. Its log says why.", "server_error")
    return Reply(error_response(failure, request.url.path))


async def _unless_hung_up(request: Request, work: Awaitable[Reply]) -> Reply:
    """The reply of work, which is cancelled when the client hangs up."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for other in (task, watch):
            if not other.done():
                other.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _label(response: Response, answer: Answer) -> None:
    """Say in the headers what the answer was made with."""
    response.headers[RATIO_HEADER] = ",".join(str(ratio) for ratio in answer.ratios)
    losses = [variant.loss for variant in answer.variants if variant.loss is not None]
    if len(losses) == len(answer.variants):
        response.headers[LOSS_HEADER] = f"{sum(losses) / len(losses):.4f}"


def reading(handler: Callable[[ServerState, Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint without a body, which asks for the key."""

    async def run(request: Request) -> Response:
        state: ServerState = request.app.state.server
        try:
            check_key(state, request)
            return handler(state, request)
        except ApiError as error:
            return error_response(error, request.url.path)

    return run
