"""Writing tensors to a safetensors file."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def write_weights(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file whose bytes depend only on names and values."""
    try:
        save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, path)
    except SafetensorError as error:
        # SafetensorError reports a system error, such as a full disk, only in its text.
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
    path.chmod(0o644)  # safetensors sets 0600, which a serving process of another user cannot read
