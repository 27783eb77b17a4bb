"""Where a graph leaves eager PyTorch: module by module.

The values between modules are made outputs of the graph, and each is compared with what the module gives in
eager PyTorch, within the same budget as the outputs are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.numpy import save_file
from torch import nn

from variator_export.engines.base import Arrays
from variator_export.engines.eager import EagerModel
from variator_export.graph.modules import extract_module, mark_outputs, module_inputs, module_outputs
from variator_export.stages.budget import MULTIPLE, Budget, make_pooled_budgets
from variator_export.stages.cases import Case
from variator_export.stages.compare import Deviation, deviation

# Runs a graph that was changed: its bytes and the inputs of a case, to outputs by name.
RunGraph = Callable[[bytes, Mapping[str, np.ndarray]], Arrays]


@dataclass(frozen=True)
class ModuleFinding:
    """One module in one case.

    Attributes:
        module: Its name in the PyTorch model.
        value: The name of its output in the graph.
        shape: Of that output.
        deviation: From eager PyTorch in float64; None where eager gives another number of values.
        base_error: What eager PyTorch itself is off by in the graph's precision.
    """

    module: str
    value: str
    shape: tuple[int, ...]
    deviation: Deviation | None
    base_error: Budget

    @property
    def passed(self) -> bool:
        """Whether it is within the limit."""
        return self.deviation is not None and self.base_error.allows(self.deviation)

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        found = self.deviation
        return {
            "module": self.module,
            "value": self.value,
            "shape": list(self.shape),
            "passed": self.passed,
            "used": self.base_error.used(found) if found is not None and found.finite else None,
            **(found.as_dict() if found is not None else {}),
        }

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.module}: its output has the shape {self.shape}, in eager PyTorch another size"
        if not self.deviation.finite:
            return f"{self.module}: its output holds NaN or infinite values"
        return (
            f"{self.module}: {self.deviation}, {self.base_error.used(self.deviation):.3g} times the rounding "
            f"error of eager PyTorch, of which {MULTIPLE:g} are allowed"
        )


@dataclass(frozen=True)
class Bisection:
    """What was found.

    Attributes:
        graph: The file.
        case: The case's name.
        modules: In the order in which they run, inner ones before those that hold them.
    """

    graph: str
    case: str
    modules: tuple[ModuleFinding, ...]

    @property
    def first(self) -> ModuleFinding | None:
        """The first module that leaves its budget; None: no module does."""
        return next((finding for finding in self.modules if not finding.passed), None)

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {
            "graph": self.graph,
            "case": self.case,
            "first": self.first.module if self.first else None,
            "modules": [finding.as_dict() for finding in self.modules],
        }

    def __str__(self) -> str:
        where = f"{self.graph}, case {self.case}"
        first = self.first
        if first is None:
            last = self.modules[-1].module if self.modules else "none"
            return (
                f"{where}: no module leaves its budget, the last being {last}. The fault is behind it, or in "
                "what the runtime makes of several modules at once (it cannot, where values between them are "
                "outputs)."
            )
        return f"{where}: the first module that leaves its budget is {first}."


def bisect(
    graph: Path, run: RunGraph, exact: EagerModel, rounded: EagerModel, case: Case, precision: str
) -> Bisection:
    """Compare every module's output.

    Args:
        graph: The ONNX file.
        run: Runs a changed copy of it.
        exact: Eager in float64, of the same modules as the graph was traced from.
        rounded: Eager in the graph's precision.
        case: The inputs.
        precision: Of the graph.
    """
    model = ir.load(graph)
    values = module_outputs(model)
    mark_outputs(model, values.values())
    found = run(ir.to_proto(model).SerializeToString(), case.inputs)
    expected, same = (_module_outputs(eager, case.inputs) for eager in (exact, rounded))
    names = [name for name in expected if name in values]
    budgets = make_pooled_budgets([deviation(same[name], expected[name]) for name in names], precision)
    findings = []
    for name, base in zip(names, budgets, strict=True):
        value = found[values[name]]
        # The graph may have another shape for the same numbers, but not another count of them.
        result = deviation(value, expected[name]) if value.size == expected[name].size else None
        findings.append(ModuleFinding(name, values[name], value.shape, result, base))
    return Bisection(graph.name, case.name, tuple(findings))


def _module_outputs(eager: EagerModel, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """The output of every module (of several the first), in the order in which the modules end."""
    found: Arrays = {}
    hooks = []

    def record(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                found[name] = value.detach().double().numpy()

        return hook

    for name, module in eager.transformer.named_modules():
        if name:
            hooks.append(module.register_forward_hook(record(name)))
    try:
        eager.run(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


_SCRIPT = '''"""Runs one module of a graph and compares it with eager PyTorch: python reproduce.py"""

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

session = onnxruntime.InferenceSession("graph.onnx", providers=["CPUExecutionProvider"])
(found,) = session.run(None, load_file("inputs.safetensors"))
expected = load_file("expected.safetensors")["output"]
if found.size != expected.size:
    raise SystemExit(f"the graph gives the shape {found.shape}, eager PyTorch {expected.shape}")
expected = expected.reshape(found.shape)
error = np.linalg.norm(found.astype(np.float64) - expected) / (np.linalg.norm(expected) or 1.0)
print(f"onnxruntime {onnxruntime.__version__}: relative Frobenius error {error:.3e}")
print("eager PyTorch's own in this precision: %(base).3e; allowed: %(allowed).3e")
'''


def write_reproduction(
    graph: Path, run: RunGraph, exact: EagerModel, case: Case, finding: ModuleFinding, folder: Path
) -> None:
    """Write a folder that shows the fault of one module without this package.

    `graph.onnx` (the module alone, with its weights), `inputs.safetensors` (what it got in the graph),
    `expected.safetensors` (what eager PyTorch gives, float64), `reproduce.py`.
    """
    model = ir.load(graph)
    entering = module_inputs(model, finding.module)
    given = {value.name for value in model.graph.inputs}
    mark_outputs(model, [name for name in entering if name not in given])
    found = {**case.inputs, **run(ir.to_proto(model).SerializeToString(), case.inputs)}
    expected = _module_outputs(exact, case.inputs)[finding.module]
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {name: np.ascontiguousarray(found[name]) for name in entering}
    extracted = extract_module(ir.load(graph), finding.module, inputs, finding.value)
    ir.save(extracted, folder / "graph.onnx")
    save_file(inputs, folder / "inputs.safetensors")
    save_file({"output": np.ascontiguousarray(expected)}, folder / "expected.safetensors")
    base = finding.base_error.relative_frobenius
    script = _SCRIPT % {"base": base, "allowed": base * MULTIPLE}
    (folder / "reproduce.py").write_text(script, encoding="utf-8")
