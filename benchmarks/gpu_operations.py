"""Each operation of the plugin alone: its time beside that of its bytes at the bandwidth of a copy.

This tests the estimate that a plugin's kernels are bound by memory and by their own start.
"""

from collections.abc import Callable
from typing import Any

import torch

from gpu_timing import Prepared, as_graph, time_in_turns
from variator_export.kernels.operators import compress, decompress
from variator_export.model.plugin import CompressionLayer, DecompressionLayer

# Rows x tokens x hidden size x ratio: MiniLM and T5-base.
SHAPES = ("1x128x384x4", "32x128x384x4", "32x128x768x4", "64x512x768x4", "64x512x768x8")
TINY = ("1x16x32x4",)
_BOTTLENECK = 64
_REPLAYS = 50
_COPIED = 1 << 30  # bytes


def bandwidth() -> dict[str, float]:
    """Bytes per second of a copy on the device, read and written."""
    source = torch.empty(_COPIED, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = time_in_turns({"copy": as_graph(lambda: target.copy_(source))}, _REPLAYS)
    return {"bytes_per_second": 2 * _COPIED / (times["copy"]["warm_ms"]["median"] / 1e3)}


def table(shape: str, device: str) -> dict[str, Any]:
    """Time the operations at a shape, in bfloat16 (float32 on a CPU), in turns.

    Returns:
        For each operation its times, and the bytes that it has to read and write.
    """
    rows, tokens, hidden, ratio = map(int, shape.split("x"))
    windows, m = tokens // ratio, _BOTTLENECK
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    first = CompressionLayer(ratio, hidden).to(device, dtype)
    last = DecompressionLayer(hidden, m).to(device, dtype)
    for parameter in (*first.parameters(), *last.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
    x, y = random(rows, windows, ratio, hidden), random(rows, windows, hidden)
    inner = random(rows, windows, ratio, m)
    weights = torch.softmax(random(rows, windows, ratio), -1)
    norm = random(hidden), random(hidden)
    down, up = last.down, last.up
    all_x, all_y, all_inner = x.numel(), y.numel(), inner.numel()
    operations: dict[str, tuple[Callable[[], object], int]] = {
        "scores": (
            lambda: torch.nn.functional.linear(x.flatten(2), first.weight, first.bias),
            all_x + first.weight.numel() + weights.numel(),
        ),
        "softmax and weighted sum": (
            lambda: (x * torch.softmax(weights, -1).unsqueeze(-1)).sum(-2),
            all_x + weights.numel() + all_y,
        ),
        "compression": (lambda: first(x), all_x + first.weight.numel() + all_y),
        "down": (
            lambda: torch.nn.functional.linear(x, down.weight[:, hidden:]),
            all_x + down.weight.numel() // 2 + all_inner,
        ),
        "up": (
            lambda: torch.nn.functional.linear(inner, up.weight, up.bias),
            all_inner + up.weight.numel() + all_x,
        ),
        "decompression": (
            lambda: last(y, x, split=True),
            all_y + 2 * all_x + down.weight.numel() + up.weight.numel(),
        ),
        "decompression, residual and norm": (
            lambda: torch.nn.functional.layer_norm(last(y, x, split=True) + x, (hidden,), *norm, 1e-5),
            all_y + 2 * all_x + down.weight.numel() + up.weight.numel(),
        ),
    }
    if device == "cuda":  # Triton interprets them on a CPU
        operations["fused compress"] = (
            lambda: compress(x, None, first.weight, first.bias, down.weight),
            all_x + first.weight.numel() + all_y + down.weight.numel() // 2 + all_inner,
        )
        given = y, x, inner, down.weight, down.bias, up.weight, up.bias
        operations["fused decompress, residual and norm"] = (
            lambda: decompress(*given, *norm, 1e-5, True),
            all_y + 2 * all_x + all_inner + down.weight.numel() // 2 + up.weight.numel(),
        )
    with torch.inference_mode():
        prepared = {
            name: as_graph(run) if device == "cuda" else Prepared(run, None, "on a CPU")
            for name, (run, _) in operations.items()
        }
        times = time_in_turns(prepared, _REPLAYS)
    return {
        name: {**times[name], "bytes": elements * x.element_size()}
        for name, (_, elements) in operations.items()
    }
