"""Opening a graph the way it is verified on this machine."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from variator_export.core.environment import require
from variator_export.core.precision import find_precision
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner

if TYPE_CHECKING:
    import onnx_ir as ir

# How graphs ran: unchanged, or as a copy in another type. Reports contain these words.
AS_IT_IS = "as they are"
WIDENED = "on a copy widened to float32: ONNX Runtime has no bfloat16 products on a CPU"


def how_it_runs(precision: str) -> str:
    """Return how graphs of a precision run when they are verified on this machine."""
    return AS_IT_IS if find_precision(precision).on_a_cpu else WIDENED


def open_for_verification(
    graph: Path,
    extra: Mapping[str, np.ndarray],
    precision: str,
    outputs: Mapping[str, str] | None = None,
) -> OnnxRuntimeRunner:
    """Open a graph on ONNX Runtime's CPU provider. A bfloat16 graph runs as a copy widened to float32.

    Args:
        graph: The ONNX file.
        extra: Inputs that stay the same from call to call.
        precision: The precision of the bundle.
        outputs: Where the graph has outputs (`Manifest.shared_outputs`).

    Raises:
        UserError: The graph cannot be loaded.
    """
    if how_it_runs(precision) == AS_IT_IS:
        return OnnxRuntimeRunner(graph, extra, outputs=outputs)
    return open_changed(load_for_verification(graph, precision), graph.parent, extra, precision, outputs)


def load_for_verification(graph: Path, precision: str) -> "ir.Model":
    """Load the graph that `open_for_verification` runs, to be inspected or changed."""
    require("onnx_ir", "export", "Verifying a bfloat16 graph on a CPU")
    from variator_export.graph.defaults import load_without_defaults
    from variator_export.graph.widen import bfloat16_to_float32

    model = load_without_defaults(graph)
    if how_it_runs(precision) == WIDENED:
        bfloat16_to_float32(model)
    return model


def open_changed(
    model: "ir.Model",
    weights: Path,
    extra: Mapping[str, np.ndarray],
    precision: str,
    outputs: Mapping[str, str] | None = None,
) -> OnnxRuntimeRunner:
    """Open a graph from `load_for_verification` on ONNX Runtime's CPU provider.

    Args:
        model: The changed graph.
        weights: The folder that the graph's external weights are in.
        extra: Additional inputs, as for `open_for_verification`.
        precision: The precision of the graph in the bundle.
        outputs: As for `open_for_verification`.
    """
    import onnx_ir as ir

    if how_it_runs(precision) == AS_IT_IS:
        return OnnxRuntimeRunner(
            ir.to_proto(model).SerializeToString(), extra, outputs=outputs, weights=weights
        )
    with TemporaryDirectory() as folder:  # widened weights are not in any file yet
        path = Path(folder) / "widened.onnx"
        ir.save(model, path, external_data="widened.data")
        return OnnxRuntimeRunner(path, extra, outputs=outputs)
