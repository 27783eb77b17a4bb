"""Reproduction: a folder that shows the fault of one module without this package."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import save_file

from variator_export.graph.modules import extract_module, mark_outputs, module_inputs
from variator_export.verification.bisection.bisect import (
    BisectSubject,
    DecoderCase,
    ModuleFinding,
    ModuleRunner,
    run_by_module,
)
from variator_export.verification.cases import Case
from variator_export.verification.judging.error_budget import MULTIPLE

_COMPARE = """
if found.size != expected.size:
    raise SystemExit(f"the graph returns the shape {found.shape}, eager PyTorch {expected.shape}")
expected = expected.reshape(found.shape)
error = np.linalg.norm(found.astype(np.float64) - expected) / (np.linalg.norm(expected) or 1.0)
print(f"{runtime}: relative Frobenius error {error:.3e}")
print("eager PyTorch's own rounding in this precision: BASE; allowed: ALLOWED")
"""

_ONNXRUNTIME = '''"""Runs one module of a graph and compares it with eager PyTorch: python reproduce.py"""

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

runtime = f"onnxruntime {onnxruntime.__version__}"
session = onnxruntime.InferenceSession("graph.onnx", providers=["CPUExecutionProvider"])
(found,) = session.run(None, load_file("inputs.safetensors"))
expected = load_file("expected.safetensors")["output"]
'''

ONNXRUNTIME_SCRIPT = _ONNXRUNTIME


def write_reproduction(
    target: BisectSubject, exact: ModuleRunner, case: Case | DecoderCase, finding: ModuleFinding, folder: Path
) -> None:
    """Write the reproduction of one module's fault.

    The folder contains `graph.onnx` (the module alone, with its weights), `inputs.safetensors` (the module's
    inputs in the failed graph), `expected.safetensors` (the output of eager PyTorch, float64) and
    `reproduce.py`.
    """
    model = target.load()
    entering = module_inputs(model, finding.module)
    given = {value.name for value in model.graph.inputs}
    mark_outputs(model, [name for name in entering if name not in given])
    found = {**case.inputs, **target.constant, **target.open(model, case.inputs)()}
    _, expected = run_by_module(exact, case.inputs)
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {name: found[name] for name in entering}
    extracted = extract_module(target.load(), finding.module, inputs, finding.value)
    ir.save(extracted, folder / "graph.onnx")
    left = {value.name for value in extracted.graph.inputs}
    kept = {name: _tensor(array) for name, array in inputs.items() if name in left}
    save_file(kept, folder / "inputs.safetensors")
    save_file({"output": _tensor(expected[finding.module])}, folder / "expected.safetensors")
    base = finding.base_error.relative_frobenius
    compare = _COMPARE.replace("BASE", f"{base:.3e}").replace("ALLOWED", f"{base * MULTIPLE:.3e}")
    (folder / "reproduce.py").write_text(target.script + compare, encoding="utf-8")


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Convert to PyTorch: numpy has no bfloat16 of its own, and `safetensors.numpy` cannot write it."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
