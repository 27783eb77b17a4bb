"""Layers in int8 or fp8 with calibrated scales: one per output channel of weights, one for all activations.

A scale for all activations is constant, which TensorRT and OpenVINO need. It would round most channels to few
values, because some channels of a transformer's activations are tens of times as large as the others.
Activations are therefore divided by one factor per channel first, and the weights multiplied by it
(SmoothQuant, arXiv 2211.10438). `calibration` chooses factors and scales.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from variator_export.core.precision import Precision
from variator_export.model.quantization.layers import QuantizedLinear, row_scales, to_int8


@dataclass(frozen=True)
class Format:
    """A type of quantised values.

    Attributes:
        dtype: The type.
        smallest: The smallest value, which lower ones saturate to.
        largest: The largest value, which activations are scaled to.
        nearest: Rounds float values within this range to the type.
    """

    dtype: torch.dtype
    smallest: float
    largest: float
    nearest: Callable[[Tensor], Tensor]

    def rounded(self, values: Tensor) -> Tensor:
        """Round float values to the type and saturate, as ONNX's QuantizeLinear does."""
        return self.nearest(values.clamp(self.smallest, self.largest))

    def quantized(self, scaled: Tensor) -> Tensor:
        """Round, in the type of the argument."""
        return self.rounded(scaled).to(scaled.dtype)


INT8 = Format(torch.int8, -128, 127, to_int8)
FLOAT8 = Format(torch.float8_e4m3fn, -448, 448, lambda values: values.to(torch.float8_e4m3fn))
FORMATS = {"I8": INT8, "F8_E4M3": FLOAT8}


def format_of(precision: Precision) -> Format:
    """The type of the quantised values of a precision."""
    return FORMATS[precision.safetensors]


@dataclass(frozen=True)
class LayerScales:
    """What calibration found for one linear layer.

    Attributes:
        input_scale: float (); the quantised activations times this scale are the smoothed activations.
        smoothing: float (in,); the factor that each channel of the activations is multiplied by. None
            without smoothing.
    """

    input_scale: Tensor
    smoothing: Tensor | None


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale in the type that it is stored in, and never 0: float16 has no smaller normal number."""
    return scale.to(dtype).clamp_min(torch.finfo(dtype).tiny)


class StaticLinear(QuantizedLinear):
    """A linear layer whose product is computed in int8 or fp8, with a constant scale of its input.

    y = (weight_scale * weight) @ (input_scale * round(smoothing * x / input_scale)) + bias, rounded to the
    nearest value of the quantised type and saturated at its ends.

    Args:
        weight: float32 (out, in).
        bias: float (out,); None if the layer has none.
        scales: What calibration found, in the type that the rest of the model has. Layers that read one
            input share the tensors, so that graphs quantise the input once.
        precision: The precision.

    Attributes:
        input_scale: float ().
        smoothing: float (in,); None without smoothing.
    """

    input_scale: Tensor
    smoothing: Tensor | None

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, scales: LayerScales, precision: Precision
    ) -> None:
        self._format = kind = format_of(precision)
        dtype: torch.dtype = getattr(torch, precision.dtype)
        if scales.smoothing is not None:
            weight = weight / scales.smoothing.float()
        # Quantised with the scale as it is stored: float16 rounds it.
        scale = stored_scale(row_scales(weight, precision.largest_weight), dtype)
        super().__init__(kind.rounded(weight / scale.float()[:, None]), scale, bias)
        self.register_buffer("input_scale", scales.input_scale)
        self.register_buffer("smoothing", scales.smoothing)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of `x`."""
        if self.smoothing is not None:
            x = x * self.smoothing.to(x.dtype)
        scale = self.input_scale.to(x.dtype)
        if torch.compiler.is_exporting():
            product = self._exported_product(x, scale)
        else:
            scaled = x / scale
            values = self._format.quantized(scaled) if self.given is None else self.given.take(scaled)
            weight = self.weight.to(x.dtype) * self.weight_scale.to(x.dtype)[:, None]
            product = nn.functional.linear(values * scale, weight)
        return product if self.bias is None else product + self.bias

    def _exported_product(self, x: Tensor, scale: Tensor) -> Tensor:
        """The product of ONNX's quantised and dequantised values, which the exporter copies.

        TensorRT needs the weight's DequantizeLinear directly behind the weight, and symmetric values.
        """
        zero = torch.zeros((), dtype=self._format.dtype)
        quantized = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, scale, zero), dtype=self._format.dtype, shape=x.shape
        )
        values = torch.onnx.ops.symbolic(
            "DequantizeLinear", (quantized, scale, zero), dtype=x.dtype, shape=x.shape
        )
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.weight, self.weight_scale),
            {"axis": 0},
            dtype=x.dtype,
            shape=self.weight.shape,
        )
        return torch.matmul(values, weight.t())
