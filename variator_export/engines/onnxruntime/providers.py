"""Providers, the parts of ONNX Runtime that run graphs, by the target of a session."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Provider:
    """A part of ONNX Runtime that runs graphs.

    Attributes:
        name: ONNX Runtime's name for the provider.
        device: The device that holds the provider's tensors.
        needs: Software that the provider needs, for messages.
        options: Options of the provider.
    """

    name: str
    device: Literal["cpu", "cuda"]
    needs: str
    options: Mapping[str, str] = field(default_factory=dict)


_GPU = "onnxruntime-gpu and the CUDA libraries that it was built for"
# Keys: the target of a session.
PROVIDERS = {
    "onnxruntime": Provider("CPUExecutionProvider", "cpu", "onnxruntime"),
    "onnxruntime-cuda": Provider(
        # The default is TF32, float32 products with 10 bits of mantissa, which no bundle asks for.
        "CUDAExecutionProvider",
        "cuda",
        _GPU,
        {"use_tf32": "0"},
    ),
    # The wheel of onnxruntime-gpu 1.31 is built for TensorRT 10, whatever else is installed.
    "onnxruntime-tensorrt": Provider("TensorrtExecutionProvider", "cuda", f"{_GPU}, and TensorRT 10"),
    "onnxruntime-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider", "cuda", "an ONNX Runtime built with TensorRT for RTX"
    ),
}
CPU = PROVIDERS["onnxruntime"]
