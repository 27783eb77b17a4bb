"""The fused kernels as operators of PyTorch, for eager models and torch.compile.

Shapes: B batch, W windows, k ratio, d hidden size, m bottleneck size.
"""

import contextlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from variator_export.core.environment import require
from variator_export.core.errors import UserError
from variator_export.kernels.launch import DTYPES, OPTIONS, PluginSizes


@torch.library.custom_op("variator::compress", mutates_args=())
def compress(
    x: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """Compress windows, and multiply their vectors by the part of `down` that reads them.

    Args:
        x: Hidden vectors, (B, W, k, d).
        keep: bool (B, W, k), False for vectors to exclude; None includes every vector.
        weight: (k, k * d), of the compression layer.
        bias: (k,), of the compression layer.
        down: (m, 2 * d), of the decompression layer.

    Returns:
        One vector per window, (B, W, d), and the products, (B, W, k, m); both in the type of x.

    Raises:
        UserError: x is not on a GPU, or Triton is not installed.
    """
    kernels, sizes = _kernels(x), _sizes(x, down)
    compressed = x.new_empty((*x.shape[:2], sizes.hidden_size))
    projected = x.new_empty((*x.shape[:3], sizes.bottleneck_size))
    windows = x.shape[0] * x.shape[1]
    with _on_device(x):
        kernels.compress_kernel[(sizes.grid(windows),)](
            x.contiguous(),
            x if keep is None else keep.contiguous().view(torch.int8),
            *(tensor.contiguous() for tensor in (weight, bias, down)),
            windows,
            compressed,
            projected,
            **sizes.of_compress(_name(x), masked=keep is not None),
            **OPTIONS,
        )
    return compressed, projected


@compress.register_fake
def _(x: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:2], x.shape[3])), x.new_empty((*x.shape[:3], down.shape[0]))


@torch.library.custom_op("variator::decompress", mutates_args=())
def decompress(
    y: Tensor,
    x: Tensor,
    projected: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    epsilon: float = 0.0,
    residual: bool = False,
) -> Tensor:
    """Repeat each output of the feed-forward network k times, and adapt each copy to its own token.

    Args:
        y: Outputs of the network, (B, W, d).
        x: Hidden vectors before compression, (B, W, k, d).
        projected: The products that `compress` returned.
        down: (m, 2 * d), of the decompression layer.
        down_bias: (m,).
        up: (d, m).
        up_bias: (d,).
        norm_weight: (d,), of a layer norm of the result; None for no norm.
        norm_bias: (d,), of the norm; None for zeros.
        epsilon: Of the norm.
        residual: Whether to add x before the norm.

    Returns:
        One vector per token, (B, W, k, d), in the type of x.

    Raises:
        UserError: x is not on a GPU, Triton is not installed, or y is in another type than x (T5's networks
            end in float32 in a float16 backbone).
    """
    if y.dtype != x.dtype:
        raise UserError(
            f"The feed-forward network returns {y.dtype} for {x.dtype}, which the fused kernels do not add.",
            "Choose bfloat16, or run without the fused kernels.",
        )
    kernels, sizes = _kernels(x), _sizes(x, down)
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    windows = x.shape[0] * x.shape[1]
    if norm_bias is not None and norm_weight is None:
        raise UserError("The norm has a bias and no weight.", "Give both, or the weight alone.")
    has_norm = norm_weight is not None
    shift = torch.zeros_like(norm_weight) if norm_weight is not None and norm_bias is None else norm_bias
    with _on_device(x):
        kernels.decompress_kernel[(sizes.grid(windows),)](
            *(tensor.contiguous() for tensor in (y, x, projected, down, down_bias, up, up_bias)),
            norm_weight if has_norm else x,
            shift if has_norm else x,
            windows,
            result,
            **sizes.of_decompress(_name(x), residual=residual, epsilon=epsilon if has_norm else None),
            **OPTIONS,
        )
    return result


@decompress.register_fake
def _(y: Tensor, x: Tensor, projected: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _kernels(x: Tensor) -> ModuleType:
    """The kernels, which can run on a tensor; Triton's interpreter runs them on a CPU."""
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"The fused kernels run on NVIDIA GPUs, and the tensors are on {x.device}.",
            "Move the model and its inputs to a GPU, or run it without the fused kernels.",
        )
    if _name(x) not in DTYPES:
        raise UserError(
            f"The fused kernels are for {', '.join(DTYPES)}, and the tensors are {_name(x)}.",
            "Convert the model, or run it without the fused kernels.",
        )
    require("triton", "fused", "Running the fused kernels")
    from variator_export.kernels import triton_kernels

    return triton_kernels


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current GPU, whatever GPU the tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _sizes(x: Tensor, down: Tensor) -> PluginSizes:
    return PluginSizes(hidden_size=x.shape[3], ratio=x.shape[2], bottleneck_size=down.shape[0])


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
