"""Layers in int8: weights with one scale per output channel, activations with one scale per token.

A scale per token makes every row of a batch independent of the others. One scale for a whole tensor, as ONNX
Runtime's `quantize_dynamic` computes it, does not: a row's result then depends on the rest of its batch.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Activations are quantised to -127..127. -128 is left out, so that the range is symmetric.
LARGEST_ACTIVATION = 127
# Weights use 7 of the 8 bits. A CPU without VNNI adds two products of a weight and an unsigned activation in
# 16 bits, which do not overflow up to 2 * 255 * 64. With all 8 bits ONNX Runtime returns saturated sums there
# unless the caller asks for a slower kernel (`session.x64quantprecision`), and nothing says so.
LARGEST_WEIGHT = 64
# A row of an embedding table is only looked up.
LARGEST_EMBEDDING = 127
# Activations are stored unsigned, with this zero point: x86 multiplies unsigned by signed integers.
ZERO_POINT = 128
# The least value that a scale is computed from, so that a vector of zeros does not divide by zero.
_TINY = 1e-30


def quantize_rows(weight: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Quantise every row of a matrix symmetrically, with a scale of its own.

    Args:
        weight: float (rows, columns).
        largest: The largest integer.

    Returns:
        int8 (rows, columns) and float32 (rows,). Their product differs from the weight by at most half a
        scale.
    """
    scale = weight.float().abs().amax(dim=1).clamp_min(_TINY) / largest
    return torch.round(weight.float() / scale[:, None]).to(torch.int8), scale


class GivenRounding:
    """Integers to use instead of rounded activations, and the activations that they replaced.

    Args:
        integers: The integers for each call of a layer, in order.
    """

    def __init__(self, integers: Iterable[Tensor]) -> None:
        self._integers = list(integers)
        self.activations: list[Tensor] = []

    def take(self, scaled: Tensor) -> Tensor:
        """Return the integers for activations that are divided by their scale, (..., in)."""
        self.activations.append(scaled)
        return self._integers[len(self.activations) - 1].to(scaled.dtype).reshape(scaled.shape)


class Int8Linear(nn.Module):
    """A linear layer whose product is computed in int8.

    y = s(x) * weight_scale * (weight @ round(x / s(x))) + bias, where s(x) = max|x| / 127 for each vector x.

    Attributes:
        weight: int8 (out, in).
        weight_scale: float (out,).
        bias: float (out,); None if the layer has none.
        given: Integers to use instead of rounding, for verification. None to round.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight, LARGEST_WEIGHT)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.bias = linear.bias
        self.given: GivenRounding | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of `x`."""
        # Two reductions: the absolute values of `x` would be written to memory first.
        largest = torch.maximum(x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True))
        scale = largest.clamp_min(_TINY) / LARGEST_ACTIVATION
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
        weight, scale = quantize_rows(embedding.weight, LARGEST_EMBEDDING)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (...) to (..., width), in the type of the scales."""
        rows = nn.functional.embedding(ids, self.weight).to(self.weight_scale.dtype)
        return rows * nn.functional.embedding(ids, self.weight_scale[:, None])


def linear_layers(model: Any, stack: str) -> dict[str, nn.Linear]:
    """The linear layers of a transformers model's encoder, by name. Those outside it, such as heads, are not.

    Args:
        model: The model.
        stack: Name of the module that holds the encoder layers, inside the base model.
    """
    layers: nn.Module = model.base_model.get_submodule(stack)
    found = layers.named_modules(prefix=stack)
    return {name: module for name, module in found if isinstance(module, nn.Linear)}


def is_part_of(name: str, part: str) -> bool:
    """Whether a dotted name contains another one: encoder.layer.5.output contains layer.5, not layer.50."""
    return f".{part}." in f".{name}."


def quantize_model(model: Any, stack: str, kept: Collection[str]) -> int:
    """Replace the linear layers of a transformers model's encoder, and its token embeddings, by int8 layers.

    Token embeddings that an output layer shares stay as they are, because the output layer needs them.

    Args:
        model: The model, changed in place.
        stack: Name of the submodule that holds the encoder layers.
        kept: Parts of the names of linear layers that stay as they are (`is_part_of`).

    Returns:
        The number of linear layers that were replaced.
    """
    linears = {
        id(module): Int8Linear(module)
        for name, module in linear_layers(model, stack).items()
        if not any(is_part_of(name, part) for part in kept)
    }
    replaced: dict[int, nn.Module] = dict(linears)
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    if output is None or output.weight is not table:
        # T5 has two modules with one table.
        users = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is table]
        replaced |= dict.fromkeys(map(id, users), Int8Embedding(users[0]))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
    return len(linears)


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
