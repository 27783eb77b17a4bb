"""Compilation of the fused kernels without a GPU, for GPUs that are named."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from variator_export.core.environment import require
from variator_export.core.errors import UserError
from variator_export.kernels.launch import DTYPES, NUM_WARPS, OPTIONS, PluginSizes

# Compute capabilities with tensor cores for bfloat16: Ampere, Ada, Hopper, Blackwell.
COMPUTE_CAPABILITIES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")
_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
_THREADS_PER_WARP = 32
# PTX 8.7 knows all of them, and every driver since CUDA 12.8 takes it. Triton would write its newest.
_PTX = 87
# Triton's own arguments, after ours: memory for scratch and for profiles. Our kernels use neither.
_OWN_ARGUMENTS = 2
_ENTRY = re.compile(r"(\.visible \.entry (\w+)\()(.*?)(\))", re.DOTALL)


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel for one kind of GPU.

    Attributes:
        name: Name of the function in `ptx`.
        ptx: Assembly, which a driver compiles for the GPU.
        shared_bytes: Shared memory that a block needs.
        threads: Threads of a block.
        arguments: Names of the arguments, in order.
    """

    name: str
    ptx: str
    shared_bytes: int
    threads: int
    arguments: tuple[str, ...]


def compile_kernel(
    kind: Literal["compress", "decompress"],
    capability: str,
    dtype: str,
    sizes: PluginSizes,
    *,
    masked: bool = False,
    residual: bool = True,
    epsilon: float | None = None,
) -> CompiledKernel:
    """Compile a kernel.

    Args:
        kind: Which of the two.
        capability: The GPU, for example `sm90`.
        dtype: Type of the arrays: `float32`, `float16` or `bfloat16`.
        sizes: The plugin's sizes.
        masked: Whether `compress` reads which vectors to include.
        residual: Whether `decompress` adds the hidden vectors.
        epsilon: Of the layer norm in `decompress`; None for no norm.

    Raises:
        UserError: Triton is not installed, or the kernels are not for the GPU or the type.
    """
    require("triton", "fused", "Compiling the fused kernels")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from variator_export.kernels import triton_kernels

    if capability not in COMPUTE_CAPABILITIES:
        raise UserError(
            f"The fused kernels are not compiled for {capability}.",
            f"Choose one of {', '.join(COMPUTE_CAPABILITIES)}.",
        )
    if dtype not in DTYPES:
        raise UserError(f"The fused kernels are not for {dtype}.", f"Choose one of {', '.join(DTYPES)}.")
    if kind == "compress":
        kernel, constants = triton_kernels.compress_kernel, sizes.of_compress(dtype, masked=masked)
    else:
        kernel = triton_kernels.decompress_kernel
        constants = sizes.of_decompress(dtype, residual=residual, epsilon=epsilon)
    names: list[str] = kernel.arg_names
    arguments = [name for name in names if name not in constants]
    # Arrays begin at multiples of 16 bytes, as those of PyTorch and TensorRT do.
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in arguments if n != "num_windows"}
    source = ASTSource(
        fn=kernel,
        signature={name: _type(name, constants, dtype) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    target = GPUTarget("cuda", int(capability.removeprefix("sm")), _THREADS_PER_WARP)
    compiled = triton.compile(source, target=target, options={**OPTIONS, "ptx_version": _PTX})
    return CompiledKernel(
        name=compiled.metadata.name,
        ptx=_without_own_arguments(compiled.asm["ptx"], len(arguments)),
        shared_bytes=compiled.metadata.shared,
        threads=NUM_WARPS * _THREADS_PER_WARP,
        arguments=tuple(arguments),
    )


def _type(name: str, constants: dict[str, Any], dtype: str) -> str:
    if name in constants:
        return "constexpr"
    return {"num_windows": "i32", "keep": "*i8"}.get(name, _POINTERS[dtype])


def _without_own_arguments(ptx: str, count: int) -> str:
    """Remove Triton's own arguments, which nobody passes, from the declaration of a function."""
    entry = _ENTRY.search(ptx)
    assert entry is not None, "Triton's assembly has another form than expected"
    declared = entry[3].split(",")
    assert len(declared) == count + _OWN_ARGUMENTS, f"the kernel takes {len(declared)} arguments"
    for name in (parameter.split()[-1] for parameter in declared[count:]):
        assert len(re.findall(rf"\b{name}\b", ptx)) == 1, f"the kernel uses {name}"
    kept = ",".join(declared[:count])
    return ptx[: entry.start(3)] + kept + "\n" + ptx[entry.end(3) :]
