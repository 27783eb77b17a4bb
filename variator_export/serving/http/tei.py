"""`/embed`, `/predict` and `/info`, as text-embeddings-inference has them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from variator_export.core.environment import DISTRIBUTION, installed_version
from variator_export.inference import EMBEDDING
from variator_export.serving.http.encode import encode, encode_pairs, unit
from variator_export.serving.http.endpoint import Call, Reply
from variator_export.serving.http.errors import ApiError, json_response
from variator_export.serving.http.state import ServerState
from variator_export.serving.service import Answer
from variator_export.text.predictions import Labels

_WRONG = 422


async def embed(call: Call) -> Reply:
    """Answer `/embed`: a list of vectors, float32."""
    state, model = call.state, call.live.model
    fields = await call.parse(call.fields, _WRONG)
    allowed = call.allowed(None)
    if not model.embeds:
        raise ApiError(_WRONG, f"{state.model_name} has no embeddings; use /predict.")
    dimensions = fields.size("dimensions", model.bundle.manifest.backbone.hidden_size)
    normalize = fields.boolean("normalize", True)
    truncate = fields.boolean("truncate", state.settings.truncate)
    prompt_name = fields.text("prompt_name")
    given = await call.parse(fields.texts_or_ids, "inputs")
    encoded = await state.in_thread(encode, model, given, truncate, prompt_name)
    answer = await call.answer(encoded.rows, allowed)
    small = len(encoded.rows) == 1
    return Reply(await state.run(small, _vectors, answer, dimensions, normalize), answer)


async def predict(call: Call) -> Reply:
    """Answer `/predict`: labels with scores for a classifier, best first; else what `Bundle.predict` returns.

    One text or pair gets its prediction, and a list of them gets a list.
    """
    state, model = call.state, call.live.model
    fields = await call.parse(call.fields, _WRONG)
    allowed = call.allowed(None)
    truncate = fields.boolean("truncate", state.settings.truncate)
    raw = fields.boolean("raw_scores", False)
    rows, single = await call.parse(fields.rows, "inputs")
    first, second = _split(rows)
    if (missing := model.text.no_predictions(pairs=second is not None)) is not None:
        raise missing
    encoded = await state.in_thread(encode_pairs, model, first, second, truncate)
    answer = await call.answer(encoded.rows, allowed)
    if model.bundle.manifest.backbone.task == "text-classification":
        found = [_labels(model.text.config, outputs["logits"], raw) for outputs in answer.outputs]
    else:
        found = await state.in_thread(
            model.text.predictions, encoded.encodings, answer.outputs, first, second
        )
    return Reply(json_response(found[0] if single else found), answer)


def info(state: ServerState, _: Request) -> Response:
    """Answer `/info`, with the variants and what they lose beside the fields of text-embeddings-inference."""
    model, settings, limits = state.now.model, state.settings, state.now.service.limits
    manifest = model.bundle.manifest
    kind: dict[str, Any] = {"embedding": {"pooling": "in the graph"}}
    if not model.embeds:
        names = Labels.of_config(model.text.config).names
        kind = {
            "classifier": {
                "id2label": {str(index): name for index, name in enumerate(names)},
                "label2id": {name: index for index, name in enumerate(names)},
            }
        }
    return json_response(
        {
            "model_id": state.model_name,
            "model_sha": manifest.backbone.weights_sha256,
            "model_dtype": manifest.precision,
            "model_type": kind,
            "max_concurrent_requests": settings.max_connections,
            "max_input_length": model.text.encoder.max_length,
            "max_batch_tokens": limits.max_batch_tokens,
            "max_batch_requests": limits.max_batch_rows,
            "max_client_batch_size": settings.max_texts,
            "auto_truncate": settings.truncate,
            "tokenization_workers": settings.tokenizer_threads,
            "version": installed_version(DISTRIBUTION),
            "latency_goal_ms": settings.goal_ms,
            "policy": settings.policy,
            "metric": model.variants.metric,
            "variants": [{"name": v.name, "ratio": v.ratio, "loss": v.loss} for v in model.variants.all],
        }
    )


def _vectors(answer: Answer, dimensions: int | None, normalize: bool) -> Response:
    """The response to `/embed`."""
    vectors = np.stack([outputs[EMBEDDING] for outputs in answer.outputs])[:, :dimensions]
    return json_response(list(np.ascontiguousarray(unit(vectors) if normalize else vectors)))


def _labels(config: Any, logits: np.ndarray, raw: bool) -> list[dict[str, Any]]:
    """Labels with their scores, best first."""
    labels = Labels.read(config, logits.shape[-1])
    scores = logits.astype(np.float64) if raw else labels.scores(logits)
    order = np.argsort(-scores, kind="stable")
    return [{"score": float(scores[index]), "label": labels.names[index]} for index in order]


def _split(rows: Sequence[Sequence[str]]) -> tuple[list[str], list[str] | None]:
    """First and second texts of rows.

    Raises:
        ApiError: Some rows are pairs and some are not.
    """
    sizes = {len(row) for row in rows}
    if len(sizes) > 1:
        raise ApiError(_WRONG, "Some rows are pairs of texts and some are not. Send them in two requests.")
    return [row[0] for row in rows], [row[1] for row in rows] if sizes == {2} else None
