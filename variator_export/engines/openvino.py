"""Graphs on OpenVINO, on the CPU: an optional baseline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from variator_export.core.environment import default_threads, require
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays


class OpenVinoRunner:
    """A graph of one ratio.

    Args:
        graph: The ONNX file.
        threads: Number of threads; None for `OMP_NUM_THREADS`, or all cores if that is not set.

    Raises:
        UserError: OpenVINO is not installed or cannot read the graph.
    """

    def __init__(self, graph: Path, *, threads: int | None = None) -> None:
        require("openvino", "openvino", "Timing OpenVINO")
        import openvino

        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if (number := threads or default_threads()) is not None:
            options["INFERENCE_NUM_THREADS"] = number
        try:
            self._model = openvino.Core().compile_model(str(graph), "CPU", options)
        except RuntimeError as error:
            raise UserError(
                f"OpenVINO {openvino.__version__} cannot run {graph}: {str(error).strip().splitlines()[-1]}",
                "Leave it out: choose the others with --runtime.",
            ) from error
        self._names = [output.get_any_name() for output in self._model.outputs]

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the graph once; int64 inputs (B, S)."""
        found = self._model(dict(inputs))
        return {name: np.asarray(found[index]) for index, name in enumerate(self._names)}
