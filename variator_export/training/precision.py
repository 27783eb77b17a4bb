"""Choosing the precision in which this machine trains."""

from typing import Literal

import torch

from variator_export.core.errors import UserError
from variator_export.training.settings import MatmulPrecision


def choose_precision(asked: Literal["auto", "float32", "bfloat16"]) -> MatmulPrecision:
    """Resolve `auto`, which means bfloat16 if the hardware supports it natively.

    Raises:
        UserError: bfloat16 was requested on a GPU that does not support it.
    """
    if torch.cuda.is_available():
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if asked == "bfloat16" and not supported:
            raise UserError(
                f"{torch.cuda.get_device_name()} does not compute in bfloat16.", "--precision float32"
            )
    else:
        # On a CPU without native support, bfloat16 is slower but still correct, so a user may request it.
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if asked == "auto":
        return "bfloat16" if supported else "float32"
    return asked
