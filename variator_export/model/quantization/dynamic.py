"""Layers in int8: weights with one scale per output channel, activations with one scale per token.

A scale per token makes every row of a batch independent of the others. One scale for a whole tensor, as ONNX
Runtime's `quantize_dynamic` computes it, does not: a row's result then depends on the rest of its batch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from variator_export.model.quantization.layers import TINY, QuantizedLinear, row_scales, to_int8

# Activations are quantised to -127..127. -128 is left out, so that the range is symmetric.
LARGEST_ACTIVATION = 127
# A row of an embedding table is only looked up.
LARGEST_EMBEDDING = 127
# Activations are stored unsigned, with this zero point: x86 multiplies unsigned by signed integers.
ZERO_POINT = 128


class Int8Linear(QuantizedLinear):
    """A linear layer whose product is computed in int8.

    y = s(x) * weight_scale * (weight @ round(x / s(x))) + bias, where s(x) = max|x| / 127 for each vector x.
    """

    def __init__(self, linear: nn.Linear, largest_weight: float) -> None:
        super().__init__(*_int8_rows(linear.weight, largest_weight), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of `x`."""
        # Two reductions: the absolute values of `x` would be written to memory first.
        largest = torch.maximum(x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True))
        scale = largest.clamp_min(TINY) / LARGEST_ACTIVATION
        if torch.compiler.is_exporting():
            product = _quantized_product(x, scale, self.weight, self.weight_scale)
        else:
            integers = torch.round(x / scale) if self.given is None else self.given.take(x / scale)
            product = nn.functional.linear(integers, self.weight.to(x.dtype)) * self.weight_scale
        y = product * scale
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """A table of embeddings in int8, with one scale per token.

    Attributes:
        weight: int8 (tokens, width).
        weight_scale: float (tokens,).
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        weight, scale = _int8_rows(embedding.weight, LARGEST_EMBEDDING)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (...) to (..., width), in the type of the scales."""
        rows = nn.functional.embedding(ids, self.weight).to(self.weight_scale.dtype)
        return rows * nn.functional.embedding(ids, self.weight_scale[:, None])


def int8_embeddings(model: Any) -> dict[int, nn.Module]:
    """The token embeddings of a transformers model in int8, by the `id` of the modules to replace.

    Embeddings that an output layer shares are not replaced, because the output layer needs them.
    """
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    if output is not None and output.weight is table:
        return {}
    # T5 has two modules with one table.
    users = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is table]
    return dict.fromkeys(map(id, users), Int8Embedding(users[0]))


def _int8_rows(weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """A matrix in int8 and the scale of each row, float32 (rows,).

    Their product differs from the weight by at most half a scale.
    """
    scale = row_scales(weight, largest)
    return to_int8(weight.float() / scale[:, None]), scale


def _quantized_product(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The product of rounded activations and a weight, with ONNX operators that the exporter copies.

    ONNX Runtime replaces the MatMul of two DequantizeLinear by one product of integers, which multiplies by
    the scales of the weight too. It allows one scale for all activations. The activations are therefore read
    with the scale 1, and the caller multiplies by the scale of each token. Quantisation in blocks as long as
    a token (opset 21) divides and rounds in one step.

    Args:
        x: float (..., in).
        scale: float (..., 1), one for each token.
        weight: int8 (out, in).
        weight_scale: float (out,).

    Returns:
        float (..., out).
    """
    zero_point = torch.tensor(ZERO_POINT, dtype=torch.uint8)
    quantized = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (x, scale, zero_point.expand_as(scale)),
        {"axis": -1, "block_size": x.shape[-1]},
        dtype=torch.uint8,
        shape=x.shape,
    )
    integers = torch.onnx.ops.symbolic(
        "DequantizeLinear", (quantized, torch.tensor(1.0), zero_point), dtype=x.dtype, shape=x.shape
    )
    weights = torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (weight.t(), weight_scale),
        {"axis": 1},
        dtype=x.dtype,
        shape=(weight.shape[1], weight.shape[0]),
    )
    return torch.matmul(integers, weights)
