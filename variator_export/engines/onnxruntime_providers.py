"""The parts of ONNX Runtime that run graphs, by the target of a session."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Provider:
    """A part of ONNX Runtime that runs graphs.

    Attributes:
        name: As ONNX Runtime calls it.
        device: Where its tensors are.
        needs: What has to be installed for it, for people.
    """

    name: str
    device: Literal["cpu", "cuda"]
    needs: str


_GPU = "onnxruntime-gpu and the CUDA libraries that it is built for"
# By the target of a session.
PROVIDERS = {
    "onnxruntime": Provider("CPUExecutionProvider", "cpu", "onnxruntime"),
    "onnxruntime-cuda": Provider("CUDAExecutionProvider", "cuda", _GPU),
    # The wheel of onnxruntime-gpu 1.31 is built for TensorRT 10, whatever else is installed.
    "onnxruntime-tensorrt": Provider("TensorrtExecutionProvider", "cuda", f"{_GPU}, and TensorRT 10"),
    "onnxruntime-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider", "cuda", "an ONNX Runtime that is built with TensorRT for RTX"
    ),
}
CPU = PROVIDERS["onnxruntime"]
