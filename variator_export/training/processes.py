"""This process among those that train together (accelerate launch, torchrun, MPI)."""

from typing import Any

import torch

from variator_export.core.errors import UserError


def device() -> torch.device:
    """Where this process trains."""
    return torch.device(_state().device)


def num_processes() -> int:
    """How many processes train together."""
    return int(_state().num_processes)


def is_main_process() -> bool:
    """Whether this process writes files and talks."""
    return bool(_state().is_main_process)


def _state() -> Any:
    from accelerate import PartialState

    try:
        state = PartialState(cpu=not torch.cuda.is_available())
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"The processes that are to train together do not find each other: {error}",
            "Start them with accelerate launch or torchrun, or unset WORLD_SIZE to train in one process.",
        ) from error
    if state.num_processes == 1 and torch.cuda.device_count() > 1:
        raise UserError(
            f"This machine has {torch.cuda.device_count()} GPUs and one process, which trains on one.",
            "Choose one (CUDA_VISIBLE_DEVICES=0), or use all: accelerate launch --multi_gpu "
            "-m variator_export train ...",
        )
    return state
