"""Versions of ONNX Runtime that have the operators of a bundle's graphs."""

from packaging.version import Version

from variator_export.core.environment import installed_version, require_onnxruntime
from variator_export.core.errors import UserError
from variator_export.core.precision import find_precision

# QuantizeLinear in blocks came with opset 21. ONNX Runtime has that of opset 23 since 1.24.
_BLOCKS_OPSET = 21
_QUANTIZE_OPSET, _QUANTIZE_VERSION = 23, Version("1.24")


def check_quantized(precision: str, opset: int) -> None:
    """Check that quantised graphs can be written and run here.

    Raises:
        UserError: The opset has no quantisation in blocks, or the installed ONNX Runtime has no kernel.
    """
    if find_precision(precision).quantization == "dynamic" and opset < _BLOCKS_OPSET:
        raise UserError(
            f"{precision} graphs need opset {_BLOCKS_OPSET}, the first that can quantise in blocks.",
            f"Build them with --opset {_BLOCKS_OPSET} or 23.",
        )
    installed = str(installed_version(require_onnxruntime()))
    if opset >= _QUANTIZE_OPSET and Version(installed) < _QUANTIZE_VERSION:
        raise UserError(
            f"{precision} graphs of opset {opset} need ONNX Runtime {_QUANTIZE_VERSION}; {installed} is "
            "installed.",
            "Upgrade it, or build the bundle with --opset 21.",
        )
