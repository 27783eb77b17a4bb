"""Bisection of a failed graph or engine: find the first module that differs from eager PyTorch.

The values between modules become outputs of the graph. Each is compared with the output of the same module in
eager PyTorch, within the same budget as the graph's own outputs. A runtime does not fuse across an output, so
a fault caused by fusion goes away. In that case fewer values become outputs: those of the outer modules.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.graph.modules import mark_outputs, module_outputs
from variator_export.verification.cases import Case
from variator_export.verification.judging.compare import Deviation, deviation
from variator_export.verification.judging.error_budget import MULTIPLE, Budget, make_pooled_budgets
from variator_export.verification.judging.judge import Finding, judge


class ModuleRunner(Protocol):
    """Eager PyTorch, as it is bisected.

    Attributes:
        transformer: The transformers model, whose modules are compared.
    """

    transformer: Any

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run what the graph computes once."""
        ...


class TracedModel(ModuleRunner, Protocol):
    """A model in eager PyTorch with the modules that its graphs were traced from."""

    def decoder_step(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run what the graph of the decoder computes once."""
        ...


class EagerDecoder:
    """One step of the decoder in eager PyTorch, on the inputs of the decoder's graph."""

    def __init__(self, eager: TracedModel) -> None:
        self.transformer = eager.transformer
        self.run = eager.decoder_step


@dataclass(frozen=True)
class DecoderCase:
    """A case of the decoder's graph.

    Attributes:
        name: The name of the encoder's case, and the number of the token.
        inputs: The inputs of the decoder's graph.
    """

    name: str
    inputs: Arrays

    @property
    def judged_rows(self) -> slice:
        """The rows whose outputs are compared: all."""
        return slice(None)


@dataclass(frozen=True)
class BisectSubject:
    """A graph, or an engine that was built from one.

    Attributes:
        name: The file that failed.
        again: A phrase for what `open` does with the graph ("opened again").
        load: Function that returns the graph, ready to be changed.
        open: Function that opens a changed graph the way the file was opened, or builds an engine from it the
            way the file was built. It accepts the graph and the inputs of a case, and returns a function that
            returns the outputs.
        constant: Inputs besides those of a case: the plugin of an any-ratio graph.
        script: The first part of the reproduction's program (`reproduction.py`).
    """

    name: str
    again: str
    load: Callable[[], ir.Model]
    open: Callable[[ir.Model, Mapping[str, np.ndarray]], Callable[[], Arrays]]
    constant: Mapping[str, np.ndarray]
    script: str


@dataclass(frozen=True)
class ModuleFinding:
    """Finding for one module in one case.

    Attributes:
        module: The module's name in the PyTorch model.
        value: The name of the module's output in the graph.
        shape: The shape of that output.
        deviation: The deviation from eager PyTorch in float64. None if eager PyTorch returns a different
            number of values.
        base_error: The error of eager PyTorch itself in the graph's precision.
    """

    module: str
    value: str
    shape: tuple[int, ...]
    deviation: Deviation | None
    base_error: Budget

    @property
    def passed(self) -> bool:
        """Whether the module's output is within the limit."""
        return self.deviation is not None and self.base_error.allows(self.deviation)

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as a dictionary for a report."""
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
            return f"{self.module}: its output has the shape {self.shape}, in eager PyTorch a different size"
        if not self.deviation.finite:
            return f"{self.module}: its output holds NaN or infinite values"
        return (
            f"{self.module}: {self.deviation}, {self.base_error.used(self.deviation):.3g} times the rounding "
            f"error of eager PyTorch; the limit is {MULTIPLE:g} times"
        )


@dataclass(frozen=True)
class Bisection:
    """Result of a bisection.

    Attributes:
        graph: The file that was bisected.
        case: The case's name.
        modules: Findings for the inspected modules in the order in which they run, inner modules before the
            modules that contain them.
        num_modules: The number of modules that have an output in the graph.
        outputs_failed: Whether the file's own outputs exceeded their limit in this run. None if they never
            did, because only the independence of the rows failed.
        hidden: The number of inspected modules with which the fault went away in an earlier attempt. 0 if it
            did not go away.
        refused: The number of modules with which the runtime refused the graph in an earlier attempt, and the
            runtime's message. None if no attempt was refused.
        right_again: How the unchanged file was run again, if its outputs were right that time. None if they
            were wrong again, or if this was not tried.
    """

    graph: str
    case: str
    modules: tuple[ModuleFinding, ...]
    num_modules: int
    outputs_failed: bool | None
    hidden: int = 0
    refused: tuple[int, str] | None = None
    right_again: str | None = None

    @property
    def first(self) -> ModuleFinding | None:
        """The first module that exceeds its budget. None if no module does."""
        return next((finding for finding in self.modules if not finding.passed), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as a dictionary for a report."""
        return {
            "graph": self.graph,
            "case": self.case,
            "first": self.first.module if self.first else None,
            "num_modules": self.num_modules,
            "outputs_failed": self.outputs_failed,
            "hidden": self.hidden,
            "refused": self.refused,
            "right_again": self.right_again,
            "modules": [finding.as_dict() for finding in self.modules],
        }

    def __str__(self) -> str:
        return f"{self.graph}, case {self.case}: {self._answer()}{self._remarks()}"

    def _answer(self) -> str:
        if self.right_again is not None:
            return f"{self.right_again}, it is right: the fault is in this file, or it comes and goes."
        if self.first is not None:
            though = ", though the outputs are within theirs in that run" * (self.outputs_failed is False)
            return f"the first module that exceeds its budget is {self.first}{though}."
        last = self.modules[-1].module if self.modules else "none"
        found = f"no module exceeds its budget (the last module is {last})"
        if self.outputs_failed is None:
            return f"{found}, and the outputs are within theirs: only the independence of the rows fails."
        if self.outputs_failed:
            return f"{found}, but the outputs exceed theirs: the fault is behind the last module."
        return (
            f"{found}, and the outputs are within theirs as soon as values between modules are outputs: the "
            "runtime introduces the fault where it fuses across modules."
        )

    def _remarks(self) -> str:
        remarks = ""
        if self.hidden > len(self.modules):
            remarks += (
                f" {len(self.modules)} of {self.num_modules} modules were inspected: with {self.hidden} the "
                "fault goes away, as it does when the runtime introduces it by fusing across modules."
            )
        if self.refused is not None:
            remarks += f" With {self.refused[0]} modules the runtime refuses the graph ({self.refused[1]})."
        return remarks


def bisect(
    target: BisectSubject,
    exact: ModuleRunner,
    rounded: ModuleRunner,
    case: Case | DecoderCase,
    findings: Sequence[Finding],
    precision: str,
) -> Bisection:
    """Compare every module's output with eager PyTorch.

    Args:
        target: The graph or engine that failed.
        exact: Eager PyTorch in float64, with the same modules that the graph was traced from.
        rounded: Eager PyTorch in the graph's precision.
        case: The case whose inputs are run.
        findings: The findings for the target's own outputs in that case.
        precision: The precision of the graph.

    Raises:
        UserError: The runtime refuses the graph, however few values are outputs, or fails to run it.
    """
    wanted, expected = run_by_module(exact, case.inputs)
    _, same = run_by_module(rounded, case.inputs)
    # A module of eager PyTorch without a value in the graph is left out.
    values = {name: value for name, value in module_outputs(target.load()).items() if name in expected}
    names = [name for name in expected if name in values]
    if not names:
        raise UserError(
            f"No value in {target.name} belongs to a module of eager PyTorch.",
            "Verify it without --bisect.",
        )
    deviations = [deviation(same[name], expected[name]) for name in names]
    budgets = dict(zip(names, make_pooled_budgets(deviations, precision), strict=True))
    failed = [finding for finding in findings if not finding.passed]

    def run_with_outputs(modules: Sequence[str]) -> tuple[Arrays, bool]:
        """Run with these modules' values as outputs. Also return whether the own outputs fail again."""
        model = target.load()
        mark_outputs(model, [values[name] for name in modules])
        found = target.open(model, case.inputs)()
        return found, any(not _judge_again(f, found, wanted, case.judged_rows).passed for f in failed)

    attempts: list[Bisection] = []
    chosen, hidden, refused = names, 0, None
    while chosen:
        fewer = _without_innermost(chosen)
        try:
            found, still = run_with_outputs(chosen)
        except UserError as error:
            # TensorRT for RTX 1.7 cannot build an engine from a ModernBERT graph whose `Wqkv` is an output.
            if not fewer and not attempts:
                raise
            chosen, refused = fewer, (len(chosen), error.message.splitlines()[-1].strip())
            continue
        modules = tuple(
            _judge_module(name, values[name], found[values[name]], expected[name], budgets[name])
            for name in chosen
        )
        outputs_failed = still if failed else None
        result = Bisection(target.name, case.name, modules, len(names), outputs_failed, hidden, refused)
        if outputs_failed is not False:
            return result
        if not attempts and not run_with_outputs([])[1]:
            return replace(result, right_again=target.again)
        attempts.append(result)
        chosen, hidden = fewer, max(hidden, len(chosen))
    return next((result for result in attempts if result.first is not None), attempts[-1])


def _without_innermost(names: Sequence[str]) -> list[str]:
    """Return the modules without the most deeply nested ones."""
    deepest = max((name.count(".") for name in names), default=0)
    return [name for name in names if name.count(".") < deepest]


def _judge_module(
    name: str, value: str, found: np.ndarray, expected: np.ndarray, base: Budget
) -> ModuleFinding:
    # The graph may hold the same numbers in a different shape, but not a different number of them.
    result = deviation(found, expected) if found.size == expected.size else None
    return ModuleFinding(name, value, found.shape, result, base)


def _judge_again(finding: Finding, found: Arrays, expected: Arrays, rows: np.ndarray | slice) -> Finding:
    output = finding.question.output
    return judge(finding.question, found.get(output), expected[output], finding.base_error, rows)


def run_by_module(eager: ModuleRunner, inputs: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
    """Run eager PyTorch and record every module's output.

    Returns:
        The model's outputs, and the output of every module (the first one if a module has several) in the
        order in which the modules finish.
    """
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
        outputs = eager.run(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, found
