"""`/v1/embeddings` and `/v1/models`, as OpenAI has them."""

import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from variator_export.inference import EMBEDDING
from variator_export.serving.http.encode import encode, unit
from variator_export.serving.http.endpoint import Call, Reply
from variator_export.serving.http.errors import ApiError, json_response
from variator_export.serving.http.state import ServerState
from variator_export.serving.service import Answer

_WRONG = 400


async def embeddings(call: Call) -> Reply:
    """Answer `/v1/embeddings`."""
    state, model = call.state, call.live.model
    fields = await call.parse(call.fields, _WRONG)
    allowed = call.allowed(pinned(call, fields.text("model")))
    if not model.embeds:
        raise ApiError(
            _WRONG, f"{state.model_name} has no embeddings; use /predict.", "model_not_supported", "model"
        )
    encoding_format = fields.choice("encoding_format", ("float", "base64"))
    dimensions = fields.size("dimensions", model.bundle.manifest.backbone.hidden_size)
    given = await call.parse(fields.texts_or_ids, "input")
    encoded = await state.in_thread(encode, model, given, state.settings.truncate)
    answer = await call.answer(encoded.rows, allowed)
    small = len(encoded.rows) == 1
    arguments = (answer, dimensions, encoding_format, state.model_name, encoded.tokens)
    return Reply(await state.run(small, _write, *arguments), answer)


def models(state: ServerState, _: Request) -> Response:
    """Answer `/v1/models`: the model, and its variants under the names that pin them."""
    name = state.model_name
    names = [name, *(f"{name}@{v.name}" for v in state.now.model.variants.all)]
    data = [{"id": n, "object": "model", "created": 0, "owned_by": "variator-export"} for n in names]
    return json_response({"object": "list", "data": data})


def pinned(call: Call, name: str | None) -> str | None:
    """The variant that a model's name pins: `minilm@4`. None if it pins none.

    Raises:
        ApiError: It is another model's name.
    """
    if name is None:
        return None
    base, _, variant = name.partition("@")
    if base != call.state.model_name:
        raise ApiError(
            404,
            f"There is no model {base!r}; this server has {call.state.model_name!r}.",
            "model_not_found",
            "model",
        )
    return variant or None


def _write(answer: Answer, dimensions: int | None, encoding: str, model: str, tokens: int) -> Response:
    """The response to `/v1/embeddings`."""
    vectors = np.stack([outputs[EMBEDDING] for outputs in answer.outputs])[:, :dimensions]
    vectors = np.ascontiguousarray(unit(vectors), dtype="<f4")
    written: list[Any] = list(vectors)
    if encoding == "base64":
        written = [base64.b64encode(vector.tobytes()).decode("ascii") for vector in vectors]
    return json_response(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(written)
            ],
            "model": model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )
