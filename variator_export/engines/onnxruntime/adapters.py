"""Compression plugins in ONNX Runtime's adapter format.

An adapter holds inputs of a graph by name. ONNX Runtime reads it in C, C++, C#, Java, Python and others, and
uses it in the calls whose `RunOptions` name it. Its classes are named after LoRA, but hold any inputs.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from variator_export.core.environment import require_onnxruntime

# Versions that ONNX Runtime stores and does not interpret: of the adapter, and of the graph that it is for.
_ADAPTER_VERSION, _GRAPH_VERSION = 1, 1


def write_adapter(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write an adapter.

    Args:
        arrays: Inputs of a graph by name. The format holds neither scalars nor bool.
        path: The file, by convention `NAME.onnx_adapter`.
    """
    require_onnxruntime()
    from onnxruntime import AdapterFormat, OrtValue

    adapter = AdapterFormat()
    adapter.set_adapter_version(_ADAPTER_VERSION)
    adapter.set_model_version(_GRAPH_VERSION)
    adapter.set_parameters({name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    adapter.export_adapter(str(path))
