"""Requests of Triton's Python backend, read into rows of tokens."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from variator_export.bundle.manifest import BackboneEntry
from variator_export.core.errors import UserError
from variator_export.inference import TextModel
from variator_export.serving.triton.tensors import RATIO, TEXT, TEXT_PAIR
from variator_export.text.tokenizer import TokenRow, token_row


@dataclass(frozen=True)
class Work:
    """A request that can be run.

    Attributes:
        rows: Rows of tokens, without padding.
        variants: The name of the variant of each row.
        width: The number of tokens in the outputs with one row per token: the caller's own, or that of the
            longest text.
    """

    rows: Sequence[TokenRow]
    variants: Sequence[str]
    width: int


def read_request(
    request: Any, backbone: BackboneEntry, model: TextModel, variant_of: Callable[[int | str], str]
) -> Work:
    """Read a request.

    Args:
        request: A `pb_utils.InferenceRequest`.
        backbone: The model's inputs.
        model: The model's tokenizer and prompts.
        variant_of: The name of the variant that a ratio or a name stands for.

    Raises:
        UserError: The request has neither texts nor token ids or both, an input does not fit, or there is no
            such variant or prompt.
    """
    inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    parameters = _parameters(request)
    texts, ids = inputs.get(TEXT), inputs.get("input_ids")
    if (texts is None) == (ids is None):
        found = f"neither {TEXT} nor" if texts is None else f"{TEXT} and"
        raise UserError(
            f"The request has {found} input_ids.", f"Send {TEXT}, or input_ids with the model's other inputs."
        )
    if texts is not None:
        rows = _text_rows(texts, inputs.get(TEXT_PAIR), model, parameters.get("prompt_name"))
        width = max(len(row.ids) for row in rows)
    else:
        rows, width = _token_rows(inputs, backbone)
    asked = _asked(inputs.get(RATIO), parameters.get("ratio"), len(rows))
    return Work(rows, [variant_of(choice) for choice in asked], width)


def _parameters(request: Any) -> dict[str, Any]:
    """The parameters of a request. Triton hands them out as JSON."""
    return dict(json.loads(request.parameters() or "{}"))


def _asked(tensor: np.ndarray | None, parameter: object, num_rows: int) -> list[int | str]:
    """The ratio of each row; an empty string for the default."""
    if tensor is None:
        if parameter is not None and (isinstance(parameter, bool) or not isinstance(parameter, int | str)):
            raise UserError(f"The parameter ratio is {parameter!r}.", "Send a ratio, or a variant's name.")
        return [_number_or_name(parameter)] * num_rows
    if parameter is not None:
        raise UserError(f"The request has the input {RATIO} and the parameter ratio.", "Send one of them.")
    ratios = tensor.reshape(-1).tolist()
    if len(ratios) != num_rows:
        raise UserError(f"{RATIO} has {len(ratios)} values for {num_rows} rows.", "Send one for each row.")
    return ratios


def _number_or_name(parameter: int | str | None) -> int | str:
    """A ratio as a number: clients send parameters as text too."""
    return int(parameter) if isinstance(parameter, str) and parameter.isdecimal() else parameter or ""


def _text_rows(
    texts: np.ndarray, pairs: np.ndarray | None, model: TextModel, prompt_name: str | None
) -> list[TokenRow]:
    first = _decoded(texts, TEXT)
    second = None if pairs is None else _decoded(pairs, TEXT_PAIR)
    if second is not None and len(second) != len(first):
        raise UserError(
            f"{TEXT_PAIR} has {len(second)} texts; {TEXT} has {len(first)}.", "Send as many of each."
        )
    return [token_row(encoding) for encoding in model.encode(first, second, prompt_name=prompt_name)]


def _decoded(texts: np.ndarray, name: str) -> list[str]:
    """Texts of a BYTES tensor (B, 1)."""
    found = []
    for row, value in enumerate(texts.reshape(-1)):
        try:
            found.append(value.decode() if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError as error:
            raise UserError(f"{name} {row + 1} is not UTF-8: {error}.", "Send UTF-8 text.") from error
    return found


def _token_rows(inputs: Mapping[str, np.ndarray], backbone: BackboneEntry) -> tuple[list[TokenRow], int]:
    """Rows of token ids (B, S), cut to their mask. The mask is 1 everywhere unless it is sent."""
    ids = inputs["input_ids"]
    given = {name: inputs[name] for name in backbone.inputs if name in inputs}
    if ids.ndim != 2 or any(array.shape != ids.shape for array in given.values()):
        shapes = {name: array.shape for name, array in given.items()}
        raise UserError(f"The inputs have the shapes {shapes}.", "Send (rows, tokens), the same for each.")
    if unread := given.keys() - {"input_ids", "attention_mask", "token_type_ids"}:
        raise UserError(f"The model has the input {sorted(unread)[0]}.", f"Send {TEXT} instead of token ids.")
    mask = given.get("attention_mask", np.ones_like(ids))
    types = given.get("token_type_ids", np.zeros_like(ids))
    lengths = mask.sum(axis=1)
    if not np.array_equal(mask, np.arange(ids.shape[1]) < lengths[:, None]) or lengths.min(initial=1) < 1:
        raise UserError(
            "A row of attention_mask is not ones and then zeros.",
            "Pad on the right, after at least one token.",
        )
    if ids.min(initial=0) < 0:
        raise UserError("input_ids holds negative numbers.", "Send token ids of the model's tokenizer.")
    if backbone.max_length is not None and lengths.max() > backbone.max_length:
        raise UserError(
            f"A row has {lengths.max()} tokens; the model's limit is {backbone.max_length}.", "Shorten it."
        )
    rows = [
        TokenRow(ids[row, :length].tolist(), types[row, :length].tolist())
        for row, length in enumerate(lengths.tolist())
    ]
    return rows, ids.shape[1]
