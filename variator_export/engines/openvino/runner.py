"""Graphs of one ratio on OpenVINO, on the CPU."""

import functools
import queue
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from variator_export.core.environment import default_threads, require
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays

# OpenVINO's names for the types in which it computes products.
# In int8-static the hint is for what is not quantised.
HINTS = {"float32": "f32", "bfloat16": "bf16", "int8-static": "f32"}
# The capability of a CPU that has products in a type.
_CAPABILITIES = {"bfloat16": "BF16"}


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's core, one for the process, which is never freed.

    On a CPU with AMX each core replaces the alternate signal stack of its thread, and puts the previous one
    back when it is freed. Of several cores, freed in another order, one puts back a stack that was freed
    before: the next signal, such as Ctrl-C, then ends the process with SIGSEGV (OpenVINO 2026.4).
    """
    require("openvino", "openvino", "Running graphs on OpenVINO")
    import openvino

    return openvino.Core()


class OpenVinoRunner:
    """A graph of one ratio. Several threads may run it at once.

    Args:
        graph: The ONNX file.
        precision: The type of the products: float32, or bfloat16.
        threads: Number of threads; None for `OMP_NUM_THREADS`, or all cores if that is not set.

    Raises:
        UserError: OpenVINO is not installed or cannot read the graph, or the CPU lacks products in this type.
    """

    def __init__(self, graph: Path, precision: str = "float32", *, threads: int | None = None) -> None:
        core = openvino_core()
        import openvino

        capability = _CAPABILITIES.get(precision)
        if capability is not None and capability not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UserError(
                f"This CPU has no products in {precision}: OpenVINO would compute in float32.",
                "Run a float32 or an int8 bundle here.",
            )
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[precision],
        }
        if (number := threads or default_threads()) is not None:
            options["INFERENCE_NUM_THREADS"] = number
        try:
            self._model = core.compile_model(str(graph), "CPU", options)
        except RuntimeError as error:
            raise UserError(
                f"OpenVINO {openvino.__version__} cannot run {graph}: {str(error).strip().splitlines()[-1]}",
                "Choose another runtime.",
            ) from error
        self._names = [output.get_any_name() for output in self._model.outputs]
        # A request runs one call at a time. One is made for each thread that calls while others run.
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the graph once; int64 inputs (B, S)."""
        try:
            request = self._requests.get_nowait()
        except queue.Empty:
            request = self._model.create_infer_request()
        try:
            found = request.infer(dict(inputs), share_inputs=True)
            outputs = {name: np.array(found[index]) for index, name in enumerate(self._names)}
        except RuntimeError as error:
            shapes = {name: array.shape for name, array in inputs.items()}
            raise UserError(
                f"OpenVINO failed on inputs of the shapes {shapes}: {str(error).strip().splitlines()[-1]}",
                "Check that every token id is in the model's vocabulary.",
            ) from error
        self._requests.put(request)
        return outputs
