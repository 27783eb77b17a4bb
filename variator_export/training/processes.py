"""This process's place in a distributed training run (accelerate launch, torchrun, MPI)."""

from typing import Any

import torch

from variator_export.core.errors import UserError


def device() -> torch.device:
    """Return the device on which this process trains."""
    return torch.device(_state().device)


def num_processes() -> int:
    """Return the number of processes that train together."""
    return int(_state().num_processes)


def is_main_process() -> bool:
    """Check whether this process is the one that writes files and prints progress."""
    return bool(_state().is_main_process)


def _state() -> Any:
    from accelerate import PartialState

    try:
        state = PartialState(cpu=not torch.cuda.is_available())
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"The processes of the training run cannot find each other: {error}",
            "Start them with accelerate launch or torchrun, or unset WORLD_SIZE to train in one process.",
        ) from error
    if state.num_processes == 1 and torch.cuda.device_count() > 1:
        raise UserError(
            f"This machine has {torch.cuda.device_count()} GPUs, but one process trains on only one.",
            "Choose one GPU (CUDA_VISIBLE_DEVICES=0), or use all: accelerate launch --multi_gpu "
            "-m variator_export train ...",
        )
    return state
