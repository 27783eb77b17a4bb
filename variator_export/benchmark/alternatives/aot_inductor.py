"""PyTorch compiled ahead of time: a library for every shape, by torch.export and AOTInductor."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from variator_export.benchmark.alternatives.setup import Setup, attempt
from variator_export.engines.base import Arrays, Runner
from variator_export.model.augmented import PlainModel
from variator_export.model.backbone import quiet_transformers

_NAME = "aot-inductor"
_MOST_ROWS, _MOST_TOKENS = 1024, 512


def aot_inductor(setup: Setup) -> Runner:
    """Compile the backbone, whose batch size and sequence length stay variable."""
    package = setup.scratch / "aot-inductor.pt2"
    names = setup.backbone.spec.family.inputs
    with attempt(_NAME, "torch", "AOTInductor cannot compile the backbone"):
        if not package.exists():
            module = PlainModel(setup.backbone).eval()
            with quiet_transformers():
                cast(Any, module.transformer).set_attn_implementation("sdpa")
            example = {name: torch.ones((3, 40), dtype=torch.int64) for name in names}
            compile_ahead(module, example, package, setup.backbone.info.max_length or _MOST_TOKENS)
        return _Compiled(load_compiled(package))


def compile_ahead(
    module: nn.Module, example: Mapping[str, torch.Tensor], package: Path, most_tokens: int
) -> None:
    """Compile a module for every batch size and length.

    Args:
        module: A module that takes its inputs as one dict.
        example: Inputs (rows, tokens, …), of which the first two axes vary.
        package: The file to write.
        most_tokens: The largest size of the second axis.
    """
    batch = torch.export.Dim("batch", min=1, max=_MOST_ROWS)
    length = torch.export.Dim("length", min=1, max=most_tokens)
    dynamic = ({name: {0: batch, 1: length} for name in example},)
    program = torch.export.export(module, (dict(example),), dynamic_shapes=dynamic, strict=False)
    torch._inductor.aoti_compile_and_package(program, package_path=str(package))


def load_compiled(package: Path) -> Callable[[Mapping[str, torch.Tensor]], Any]:
    """Load what `compile_ahead` wrote."""
    return torch._inductor.aoti_load_package(str(package))


class _Compiled:
    def __init__(self, call: Callable[[Mapping[str, torch.Tensor]], Any]) -> None:
        self._call = call
        self._lock = threading.Lock()  # a package runs one call at a time

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the model once; int64 inputs (B, S)."""
        with torch.inference_mode(), self._lock:
            outputs = self._call({name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}
