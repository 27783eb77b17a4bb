"""Providers, the parts of ONNX Runtime that run graphs, by the target of a session."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from variator_export.core.errors import UserError
from variator_export.engines.onnxruntime.compiler import Compiler


@dataclass(frozen=True)
class Provider:
    """A part of ONNX Runtime that runs graphs.

    Attributes:
        name: ONNX Runtime's name for the provider.
        device: The device that holds the provider's tensors.
        needs: Software that the provider needs, for messages.
        options: Options of the provider.
        rest: The provider for what this one does not take, besides the CPU's.
        compiler: How it compiles whole graphs; None if it runs their operators.
        plugin: The Python module of a distribution that adds the provider to an ONNX Runtime without it.
    """

    name: str
    device: Literal["cpu", "cuda"]
    needs: str
    options: Mapping[str, str] = field(default_factory=dict)
    rest: "Provider | None" = None
    compiler: Compiler | None = None
    plugin: str | None = None

    def chain(self, options: Mapping[str, str]) -> list[tuple[str, dict[str, str]]]:
        """The provider and its rest, as ONNX Runtime takes them; with options for one graph."""
        rest = self.rest.chain({}) if self.rest is not None else []
        return [(self.name, {**self.options, **options}), *rest]

    def require_products(self, placed: Iterable[tuple[str, str]]) -> None:
        """Check that no product of matrices runs on the CPU in the place of this provider's GPU.

        ONNX Runtime gives the CPU what no other provider takes, and only logs that. Some operators are better
        there: those that compute shapes.

        Args:
            placed: The provider and the operator type of each node.

        Raises:
            UserError: A product runs on the CPU.
        """
        wrong = [kind for name, kind in placed if name == CPU.name and kind.endswith(_PRODUCTS)]
        if wrong:
            kinds = ", ".join(sorted(set(wrong)))
            raise UserError(
                f"{self.name} leaves {len(wrong)} products of this graph to the CPU ({kinds}).",
                "Choose the target onnxruntime-cuda or an engine, or build the bundle in another precision.",
            )


# Last words of the types of operators that multiply matrices: FusedMatMul and MultiHeadAttention too.
_PRODUCTS = ("MatMul", "Gemm", "Attention")
_GPU = "onnxruntime-gpu and the CUDA libraries that it was built for"
CPU = Provider("CPUExecutionProvider", "cpu", "onnxruntime")
# The default is TF32, float32 products with 10 bits of mantissa, which no bundle asks for.
_CUDA = Provider("CUDAExecutionProvider", "cuda", _GPU, {"use_tf32": "0"})
# Keys: the target of a session.
PROVIDERS = {
    "onnxruntime": CPU,
    "onnxruntime-cuda": _CUDA,
    # The wheel of onnxruntime-gpu 1.31 is built for TensorRT 10, whatever else is installed.
    "onnxruntime-tensorrt": Provider(
        "TensorrtExecutionProvider",
        "cuda",
        f"{_GPU}, and TensorRT 10",
        rest=_CUDA,
        compiler=Compiler(
            "trt",
            cache=("trt_engine_cache_path", "trt_timing_cache_path"),
            enable={"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"},
            several=None,
        ),
    ),
    "onnxruntime-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "cuda",
        "onnxruntime-ep-nv-tensorrt-rtx beside ONNX Runtime 1.24 or later",
        rest=_CUDA,
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        compiler=Compiler(
            "nv", cache=("nv_runtime_cache_path",), enable={}, several={"nv_multi_profile_enable": "1"}
        ),
    ),
}
