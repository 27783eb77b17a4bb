"""Sizes with which the fused kernels are compiled and started."""

import os
from dataclasses import dataclass
from typing import Any

from variator_export.core.errors import UserError

# The fewest rows and columns of a product on tensor cores.
_LEAST = 16
# Rows of a program: few, because batches are small where the start of kernels matters.
_ROWS = 32
MOST_RATIO, MOST_BOTTLENECK = 16, 256
# The most features that are in shared memory at once, and the bytes of the tables of weights for them.
_CHUNK, _TABLES = 64, 24 << 10
NUM_WARPS = 4
DTYPES = ("float32", "float16", "bfloat16")
# How kernels are compiled. Fusing a multiplication with an addition rounds once instead of twice.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}


@dataclass(frozen=True)
class PluginSizes:
    """The sizes of a plugin that its kernels are compiled for.

    Attributes:
        hidden_size: d.
        ratio: k.
        bottleneck_size: m.

    Raises:
        UserError: The tables of a kernel would not fit into the shared memory of all GPUs.
    """

    hidden_size: int
    ratio: int
    bottleneck_size: int

    def __post_init__(self) -> None:
        if self.ratio > MOST_RATIO or self.bottleneck_size > MOST_BOTTLENECK:
            raise UserError(
                f"The fused kernels are for ratios up to {MOST_RATIO} and bottlenecks up to "
                f"{MOST_BOTTLENECK}; the plugin has {self.ratio} and {self.bottleneck_size}.",
                "Run the plugin without the fused kernels.",
            )

    @property
    def windows(self) -> int:
        """Windows that one program computes."""
        return max(_ROWS // next_power_of_2(self.ratio), 1)

    def grid(self, num_windows: int) -> int:
        """The number of programs for so many windows."""
        return -(-num_windows // self.windows)

    def _common(self, dtype: str) -> dict[str, Any]:
        padded, units = next_power_of_2(self.ratio), max(next_power_of_2(self.bottleneck_size), _LEAST)
        return {
            "HIDDEN": self.hidden_size,
            "RATIO": self.ratio,
            "BOTTLENECK": self.bottleneck_size,
            "PADDED_RATIO": padded,
            "PADDED_BOTTLENECK": units,
            "WINDOWS": self.windows,
            "CHUNK": _chunk(dtype, padded, units),
            "PRECISION": _precision(dtype),
        }

    def of_compress(self, dtype: str, *, masked: bool) -> dict[str, Any]:
        """The constants of `compress_kernel`, for arrays of a type."""
        return {**self._common(dtype), "MASKED": masked}

    def of_decompress(self, dtype: str, *, residual: bool, epsilon: float | None) -> dict[str, Any]:
        """The constants of `decompress_kernel`, for arrays of a type; without `epsilon` there is no norm."""
        norm = {"NORM": epsilon is not None, "EPSILON": epsilon or 0.0}
        return {**self._common(dtype), "RESIDUAL": residual, **norm}


def _chunk(dtype: str, ratio: int, bottleneck: int) -> int:
    """Features that are in shared memory at once, with their weights for all scores and units."""
    size = 4 if dtype == "float32" else 2
    chunk = _CHUNK
    while chunk > _LEAST and (ratio * ratio + bottleneck) * chunk * size > _TABLES:
        chunk //= 2
    return chunk


def _precision(dtype: str) -> str:
    """How products are computed: TF32 would round the factors of float32 products to 10 bits."""
    if dtype == "bfloat16" and os.environ.get("TRITON_INTERPRET") == "1":
        return "wide"
    return "ieee" if dtype == "float32" else "tf32"


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is at least `number`."""
    return 1 << (number - 1).bit_length()
