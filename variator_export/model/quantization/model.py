"""Quantisation of a transformers model in place."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from variator_export.core.precision import Precision
from variator_export.model.quantization.calibration import Calibration
from variator_export.model.quantization.dynamic import Int8Linear, int8_embeddings
from variator_export.model.quantization.layers import is_part_of, linear_layers, replace_modules
from variator_export.model.quantization.static import StaticLinear


def quantize_model(
    model: Any,
    stack: str,
    kept: Collection[str],
    precision: Precision,
    calibration: Calibration | None = None,
    original: Any = None,
) -> int:
    """Replace the linear layers of a transformers model's encoder by quantised layers.

    In float32 models, token embeddings are replaced by int8 embeddings too, unless an output layer shares
    them. On GPUs, for which the others are made, a table in float16 is read about as fast.

    Args:
        model: The model, changed in place.
        stack: Name of the submodule that holds the encoder layers.
        kept: Parts of the names of linear layers that stay as they are (`is_part_of`).
        precision: The precision.
        calibration: The calibration, for precisions that need one.
        original: The same model in float32; None if `model` is in float32 itself.

    Returns:
        The number of linear layers that were replaced.
    """

    layers = linear_layers(model, stack)
    weights = layers if original is None else linear_layers(original, stack)
    dtype = getattr(torch, precision.dtype)
    scales = {} if calibration is None else calibration.in_type(dtype)
    replacements: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        if any(is_part_of(name, part) for part in kept):
            continue
        if precision.needs_calibration:
            bias = layer.bias
            replacements[id(layer)] = StaticLinear(weights[name].weight, bias, scales[name], precision)
        else:
            replacements[id(layer)] = Int8Linear(layer, precision.largest_weight)
    count = len(replacements)
    if not precision.is_half:
        replacements |= int8_embeddings(model)
    replace_modules(model, replacements)
    return count
