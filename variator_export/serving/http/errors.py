"""Errors as answers: in OpenAI's words below /v1, in those of text-embeddings-inference elsewhere."""

import math
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import Response

# OpenAI's type of an error, and that of text-embeddings-inference, by status.
_TYPES = {
    400: ("invalid_request_error", "Validation"),
    401: ("invalid_request_error", "Unauthorized"),
    404: ("invalid_request_error", "Validation"),
    405: ("invalid_request_error", "Validation"),
    408: ("invalid_request_error", "Validation"),
    413: ("invalid_request_error", "Validation"),
    415: ("invalid_request_error", "Validation"),
    422: ("invalid_request_error", "Validation"),
    429: ("rate_limit_error", "Overloaded"),
    500: ("server_error", "Backend"),
    503: ("server_error", "Unhealthy"),
}


@dataclass
class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: The HTTP status.
        message: What is wrong and what to do.
        code: OpenAI's code of the error.
        param: The field of the request that is wrong.
        headers: Headers of the answer.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


def overloaded(reason: str, retry_after_ms: float) -> ApiError:
    """The answer to a request that was refused."""
    seconds = max(1, math.ceil(retry_after_ms / 1e3))
    why = {
        "late": "The server is too busy to answer within its latency goal.",
        "full": "The server's queue is full.",
    }[reason]
    return ApiError(
        429, f"{why} Retry after {seconds} s.", "overloaded", headers={"retry-after": str(seconds)}
    )


def error_response(error: ApiError, path: str) -> Response:
    """An error as a response, in the form of the API that the path belongs to."""
    openai_type, tei_type = _TYPES.get(error.status, _TYPES[500])
    content: dict[str, Any]
    if path.startswith("/v1/"):
        content = {
            "error": {
                "message": error.message,
                "type": openai_type,
                "param": error.param,
                "code": error.code,
            }
        }
    else:
        content = {"error": error.message, "error_type": tei_type}
    return json_response(content, error.status, error.headers)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response. Arrays of numpy are written as they are, with the shortest digits of their type."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, media_type="application/json")
