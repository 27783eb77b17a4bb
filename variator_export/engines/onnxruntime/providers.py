"""The parts of ONNX Runtime that run graphs, by the target of a session."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Provider:
    """A part of ONNX Runtime that runs graphs.

    Attributes:
        name: As ONNX Runtime calls it.
        device: Where its tensors are.
        needs: What has to be installed for it, for people.
        options: How it runs.
    """

    name: str
    device: Literal["cpu", "cuda"]
    needs: str
    options: Mapping[str, str] = field(default_factory=dict)


_GPU = "onnxruntime-gpu and the CUDA libraries that it is built for"
# By the target of a session.
PROVIDERS = {
    "onnxruntime": Provider("CPUExecutionProvider", "cpu", "onnxruntime"),
    "onnxruntime-cuda": Provider(
        # Its default is TF32, which no bundle asked for: products of float32 with 10 bits of mantissa.
        "CUDAExecutionProvider",
        "cuda",
        _GPU,
        {"use_tf32": "0"},
    ),
    # The wheel of onnxruntime-gpu 1.31 is built for TensorRT 10, whatever else is installed.
    "onnxruntime-tensorrt": Provider("TensorrtExecutionProvider", "cuda", f"{_GPU}, and TensorRT 10"),
    "onnxruntime-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider", "cuda", "an ONNX Runtime that is built with TensorRT for RTX"
    ),
}
CPU = PROVIDERS["onnxruntime"]
