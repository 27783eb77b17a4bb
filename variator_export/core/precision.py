"""Precisions: their names in each library, their rounding, and the devices that compute in them.

The only table of precisions. It holds the type names of ONNX, safetensors, PyTorch and TensorRT, and imports
none of these libraries.
"""

from dataclasses import dataclass, replace
from typing import Literal

from variator_export.core.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What graphs compute in: a floating-point type, and for linear layers perhaps a quantised type.

    Attributes:
        name: Name in recipes.
        dtype: Name in PyTorch and numpy (ml_dtypes for bfloat16).
        onnx: Name in the DataType of ONNX and onnx-ir.
        safetensors: Name in safetensors.
        tensorrt: Name in TensorRT's DataType.
        inspector: Names in the output of TensorRT's engine inspector, and in the schedule inside a plan.
        epsilon: Spacing of the type's numbers at 1. No graph can be closer to its reference than that.
        agreement: Largest relative Frobenius error at which two runs that both round count as equal
            (`quality.evaluation`). An error that changes a metric is far larger.
        keeps_float32_modules: Whether a family's float32 modules stay in float32. bfloat16 has the range of
            float32, so nothing overflows in bfloat16.
        on_a_cpu: Whether ONNX Runtime supports matrix products of this type on a CPU.
        quantization: How the linear layers are quantised (`model.quantization`), in the type that `onnx` and
            the other libraries' names say; the rest computes in `dtype`. `dynamic` computes the scales of
            activations for each token; `static` has calibrated constants. None if nothing is quantised.
        largest_weight: The largest value that weights are quantised to.
        suffix: Suffix of a bundle's default name.
    """

    name: str
    dtype: str
    onnx: str
    safetensors: str
    tensorrt: str
    inspector: tuple[str, ...]
    epsilon: float
    agreement: float
    keeps_float32_modules: bool = False
    on_a_cpu: bool = True
    quantization: Literal["dynamic", "static"] | None = None
    largest_weight: float = 0
    suffix: str = ""

    @property
    def is_half(self) -> bool:
        """Whether everything is computed in a floating-point type narrower than float32."""
        return self.dtype != FLOAT32.dtype

    @property
    def quantizes(self) -> bool:
        """Whether the linear layers are quantised."""
        return self.quantization is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether the scales of activations are constants, which are found on texts."""
        return self.quantization == "static"

    @property
    def unquantized(self) -> str:
        """Name of the precision of a model before its quantisation; its own if it does not quantise."""
        return FLOAT32.name if self.quantizes else self.name


FLOAT32 = Precision(
    name="float32",
    dtype="float32",
    onnx="FLOAT",
    safetensors="F32",
    tensorrt="FLOAT",
    inspector=("FP32", "Float", "float"),
    epsilon=2.0**-23,
    agreement=5e-5,
)
FLOAT16 = Precision(
    name="float16",
    dtype="float16",
    onnx="FLOAT16",
    safetensors="F16",
    tensorrt="HALF",
    inspector=("FP16", "Half", "half"),
    epsilon=2.0**-10,
    agreement=2e-2,
    keeps_float32_modules=True,
    suffix="-float16",
)
BFLOAT16 = Precision(
    name="bfloat16",
    dtype="bfloat16",
    onnx="BFLOAT16",
    safetensors="BF16",
    tensorrt="BF16",
    inspector=("BF16", "BFloat16", "bf16", "bfloat16"),
    epsilon=2.0**-7,
    agreement=1e-1,
    on_a_cpu=False,
    suffix="-bfloat16",
)
# 7 of the 8 bits. A CPU without VNNI adds two products of a weight and an unsigned activation in 16 bits,
# which do not overflow up to 2 * 255 * 64. With all 8 bits ONNX Runtime returns saturated sums there unless
# the caller asks for a slower kernel (`session.x64quantprecision`), and nothing says so. GPUs add in 32 bits.
_LARGEST_7_BIT_WEIGHT = 64
INT8 = Precision(
    name="int8",
    dtype="float32",
    onnx="INT8",
    safetensors="I8",
    tensorrt="INT8",
    inspector=("INT8", "Int8", "int8"),
    epsilon=2.0**-23,
    agreement=1e-1,
    quantization="dynamic",
    largest_weight=_LARGEST_7_BIT_WEIGHT,
    suffix="-int8",
)
INT8_STATIC = replace(INT8, name="int8-static", quantization="static", suffix="-int8-static")
INT8_FLOAT16 = replace(
    INT8,
    name="int8-float16",
    dtype="float16",
    epsilon=FLOAT16.epsilon,
    agreement=2.5e-1,
    keeps_float32_modules=True,
    quantization="static",
    largest_weight=127,
    suffix="-int8-float16",
)
FP8 = replace(
    INT8_FLOAT16,
    name="fp8",
    onnx="FLOAT8E4M3FN",
    safetensors="F8_E4M3",
    tensorrt="FP8",
    inspector=("FP8", "E4M3", "fp8_e4m3"),
    largest_weight=448,
    suffix="-fp8",
)

PRECISIONS = Registry(
    kind="precision",
    group="variator_export.precisions",
    contract=Precision,
    own={
        precision.name: f"{__name__}:{precision.name.upper().replace('-', '_')}"
        for precision in (FLOAT32, FLOAT16, BFLOAT16, INT8, INT8_STATIC, INT8_FLOAT16, FP8)
    },
)


def find_precision(name: str) -> Precision:
    """A precision by its name.

    Raises:
        UserError: No precision has that name.
    """
    return PRECISIONS.find(name)
