"""Precisions: their names in each library, their rounding, and the devices that compute in them.

The only table of precisions. It holds the type names of ONNX, safetensors, PyTorch and TensorRT, and imports
none of these libraries.
"""

from dataclasses import dataclass

from variator_export.core.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A floating-point type that graphs compute in.

    Attributes:
        name: Name in recipes.
        dtype: Name in PyTorch and numpy (ml_dtypes for bfloat16).
        onnx: Name in the DataType of ONNX and onnx-ir.
        safetensors: Name in safetensors.
        tensorrt: Name in TensorRT's DataType.
        inspector: Names in the output of TensorRT's engine inspector.
        epsilon: Spacing of the type's numbers at 1. No graph can be closer to its reference than that.
        agreement: Largest relative Frobenius error at which two runs that both round count as equal
            (`quality.evaluation`). An error that changes a metric is far larger.
        keeps_float32_modules: Whether a family's float32 modules stay in float32. bfloat16 has the range of
            float32, so nothing overflows in bfloat16.
        on_a_cpu: Whether ONNX Runtime supports matrix products of this type on a CPU.
        quantizes: Whether the linear layers compute in integers (`model.int8`) and the rest in `dtype`.
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
    quantizes: bool = False
    suffix: str = ""

    @property
    def is_half(self) -> bool:
        """Whether everything is computed in a floating-point type narrower than float32."""
        return self.dtype != FLOAT32.dtype

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
    inspector=("FP32", "Float"),
    epsilon=2.0**-23,
    agreement=5e-5,
)
FLOAT16 = Precision(
    name="float16",
    dtype="float16",
    onnx="FLOAT16",
    safetensors="F16",
    tensorrt="HALF",
    inspector=("FP16", "Half"),
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
    inspector=("BF16", "BFloat16"),
    epsilon=2.0**-7,
    agreement=1e-1,
    on_a_cpu=False,
    suffix="-bfloat16",
)
INT8 = Precision(
    name="int8",
    dtype="float32",
    onnx="INT8",
    safetensors="I8",
    tensorrt="INT8",
    inspector=("INT8", "Int8"),
    epsilon=2.0**-23,
    agreement=1e-1,
    quantizes=True,
    suffix="-int8",
)

PRECISIONS = Registry(
    kind="precision",
    group="variator_export.precisions",
    contract=Precision,
    own={
        precision.name: f"{__name__}:{precision.name.upper()}"
        for precision in (FLOAT32, FLOAT16, BFLOAT16, INT8)
    },
)


def find_precision(name: str) -> Precision:
    """A precision by its name.

    Raises:
        UserError: No precision has that name.
    """
    return PRECISIONS.find(name)
