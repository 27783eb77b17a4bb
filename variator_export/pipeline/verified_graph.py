"""A graph as it is verified on this machine."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from variator_export.core.environment import require
from variator_export.engines.onnxruntime_graph import OnnxRuntimeGraph

# Of graphs whose verification ran on a copy of another type.
AS_IT_IS = "as they are"
WIDENED = "on a copy widened to float32: ONNX Runtime has no bfloat16 products on a CPU"


def how_it_runs(precision: str) -> str:
    """How the graphs of a precision run when they are verified here."""
    return WIDENED if precision == "bfloat16" else AS_IT_IS


def open_for_verification(graph: Path, extra: Mapping[str, np.ndarray], precision: str) -> OnnxRuntimeGraph:
    """A graph on ONNX Runtime's CPU provider; one in bfloat16 as a copy that is widened to float32.

    Raises:
        UserError: The graph cannot be loaded.
    """
    if how_it_runs(precision) == AS_IT_IS:
        return OnnxRuntimeGraph(graph, extra)
    require("onnx_ir", "export", "Verifying a bfloat16 graph on a CPU")
    from variator_export.graph.widen import widen

    with TemporaryDirectory() as folder:
        return OnnxRuntimeGraph(widen(graph, Path(folder)), extra)
