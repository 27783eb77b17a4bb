"""The application: routes to handlers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from variator_export.serving.http import openai, tei
from variator_export.serving.http.endpoint import endpoint, reading
from variator_export.serving.http.errors import ApiError, error_response, json_response
from variator_export.serving.http.metrics import CONTENT_TYPE
from variator_export.serving.http.state import ServerState

_STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/live.js": ("live.js", "text/javascript; charset=utf-8"),
    "/live.css": ("live.css", "text/css; charset=utf-8"),
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


def make_app(state: ServerState) -> Starlette:
    """The application of a server.

    Args:
        state: The server's state. The application closes it when it ends.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        state.close()

    app = Starlette(
        routes=[
            Route("/v1/embeddings", endpoint("/v1/embeddings", openai.embeddings), methods=["POST"]),
            Route("/v1/models", reading(openai.models)),
            Route("/embed", endpoint("/embed", tei.embed), methods=["POST"]),
            Route("/predict", endpoint("/predict", tei.predict), methods=["POST"]),
            Route("/info", reading(tei.info)),
            Route("/health", _health),
            Route("/ready", _ready),
            Route("/metrics", reading(_metrics)),
            Route("/live.json", reading(_live)),
            *(Route(path, _static) for path in _STATIC),
        ],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.state.server = state
    return app


async def _health(request: Request) -> Response:
    """Whether the session still answers. If not, the server must be started again."""
    state: ServerState = request.app.state.server
    if state.now.service.healthy:
        return PlainTextResponse("ok")
    return error_response(
        ApiError(503, "The last batches failed entirely: the runtime is broken. Start the server again."),
        "/health",
    )


async def _ready(request: Request) -> Response:
    """Whether requests should be sent here."""
    state: ServerState = request.app.state.server
    if state.ready and state.now.service.healthy:
        return PlainTextResponse("ready")
    return error_response(ApiError(503, "The server takes no requests."), "/ready")


def _metrics(state: ServerState, _: Request) -> Response:
    return Response(state.metrics.text(), media_type=CONTENT_TYPE)


def _live(state: ServerState, request: Request) -> Response:
    """What the live page draws. `?since=SECOND` leaves out what it has."""
    since = request.query_params.get("since", "")
    seconds = int(since) if since.isdecimal() and len(since) < 10 else 0
    document = state.metrics.live.document(state.waiting().rows, seconds)
    return json_response({"model": state.model_name, **document}, headers={"cache-control": "no-store"})


async def _static(request: Request) -> Response:
    name, media_type = _STATIC[request.url.path]
    content = (resources.files("variator_export.serving.http") / "static" / name).read_bytes()
    return Response(content, media_type=media_type, headers=_PAGE_HEADERS)


async def _http_error(request: Request, error: Exception) -> Response:
    """An error of the routing: an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"There is no {request.url.path}. See /info, /v1/models and /.",
        405: f"{request.url.path} does not take {request.method}.",
    }.get(error.status_code, error.detail)
    return error_response(
        ApiError(error.status_code, message, headers=dict(error.headers or {})), request.url.path
    )
