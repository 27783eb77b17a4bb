"""transformers' own ONNX exporter (5.23 or later), with its fusions for ONNX Runtime on a CPU."""

from collections.abc import Mapping

import numpy as np
import torch

from variator_export.benchmark.alternatives.pooled import with_pooling
from variator_export.benchmark.alternatives.setup import Setup, attempt
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays, Runner
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner

_NAME = "transformers-exporter"


class _Exported:
    """The exported graph. It has the inputs and outputs of the transformers model."""

    def __init__(self, runner: OnnxRuntimeRunner, inputs: list[str]) -> None:
        self._runner, self._inputs = runner, inputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the graph once; int64 inputs (B, S)."""
        return self._runner.run({name: inputs[name] for name in self._inputs})


def transformers_exporter(setup: Setup) -> Runner:
    """Export the backbone with transformers."""
    if setup.backbone.spec.head.label_words is not None:
        raise UserError(
            f"{_NAME} exports the whole model, and label words are scores of one step of its decoder.",
            "Leave it out of --runtimes.",
        )
    graph, names = setup.scratch / "transformers.onnx", list(setup.backbone.spec.family.inputs)
    if not graph.exists():
        with attempt(_NAME, "transformers", "transformers' exporter cannot export the backbone", "export"):
            import onnx_ir as ir
            from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

            # No size may be 1 or equal to another, or it becomes a constant.
            example = {name: torch.ones(2, 16, dtype=torch.int64) for name in names}
            axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in names}
            config = OnnxConfig(dynamic=True, dynamic_shapes=axes, ort_fusions="cpu")
            exported = OnnxExporter().export(setup.backbone.model, example, config=config)
            ir.save(exported.program, graph, external_data="transformers.data")
    runner = _Exported(OnnxRuntimeRunner(graph, threads=setup.threads, as_it_comes=True), names)
    return with_pooling(runner, setup.backbone)
