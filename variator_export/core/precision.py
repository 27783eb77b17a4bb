"""Precisions: what each is called by the libraries that meet here, how it rounds, and what can compute in it.

The one table of them. Names of types are those of ONNX, safetensors, PyTorch and TensorRT; none is imported.
"""

from dataclasses import dataclass

from variator_export.core.registry import Registry


@dataclass(frozen=True)
class Precision:
    """A floating-point type that graphs compute in.

    Attributes:
        name: As recipes name it.
        dtype: As PyTorch and numpy (ml_dtypes for bfloat16) name it.
        onnx: As ONNX's and onnx-ir's DataType name it.
        safetensors: As safetensors names it.
        tensorrt: As TensorRT's DataType names it.
        inspector: The words of TensorRT's engine inspector for it.
        epsilon: The spacing of its numbers at 1: no graph can be nearer to its reference than that.
        agreement: The relative Frobenius error up to which two runs that both round are taken for the same
            (`quality.evaluation`); what would change a metric is far larger.
        keeps_float32_modules: Whether a family's float32 modules stay in float32. bfloat16 has the range of
            float32, so nothing overflows there.
        on_a_cpu: Whether ONNX Runtime has products of it on a CPU.
        suffix: What the default name of a bundle has behind it.
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
    suffix: str = ""

    @property
    def is_half(self) -> bool:
        """Whether it is narrower than float32."""
        return self.epsilon > FLOAT32.epsilon


FLOAT32 = Precision("float32", "float32", "FLOAT", "F32", "FLOAT", ("FP32", "Float"), 2.0**-23, 5e-5)
FLOAT16 = Precision(
    "float16",
    "float16",
    "FLOAT16",
    "F16",
    "HALF",
    ("FP16", "Half"),
    2.0**-10,
    2e-2,
    keeps_float32_modules=True,
    suffix="-float16",
)
BFLOAT16 = Precision(
    "bfloat16",
    "bfloat16",
    "BFLOAT16",
    "BF16",
    "BF16",
    ("BF16", "BFloat16"),
    2.0**-7,
    1e-1,
    on_a_cpu=False,
    suffix="-bfloat16",
)

PRECISIONS = Registry(
    kind="precision",
    group="variator_export.precisions",
    contract=Precision,
    own={
        precision.name: f"{__name__}:{precision.name.upper()}" for precision in (FLOAT32, FLOAT16, BFLOAT16)
    },
)


def find_precision(name: str) -> Precision:
    """A precision by its name.

    Raises:
        UserError: There is none of that name.
    """
    return PRECISIONS.find(name)
