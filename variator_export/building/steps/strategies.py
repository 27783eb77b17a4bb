"""The step of a build that chooses assemblies for budgets: what each layer weighs and costs is measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.benchmark.speed_table import speed_inputs
from variator_export.benchmark.timing import time_in_turns
from variator_export.building.context import BuildContext
from variator_export.building.plan_modular import ModulesPlan
from variator_export.building.variant_plan import is_reserved
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.reports import read_report
from variator_export.core.assembly import ENCODER_STACK, Span, Stack
from variator_export.core.axes import ENCODER_MASK, KINDS, past_name
from variator_export.core.environment import machine
from variator_export.core.errors import UserError
from variator_export.core.json_file import write_json
from variator_export.core.parts import DECODER
from variator_export.core.precision import find_precision
from variator_export.core.strategy import Choice, Cost, StackCost, choose_assembly
from variator_export.recipe.assemblies import AssemblyRecipe, StrategyRecipe
from variator_export.recipe.recipe import Recipe
from variator_export.verification.verified_graph import open_changed

if TYPE_CHECKING:
    import onnx_ir as ir

STRATEGY_REPORT = "reports/strategies.json"
_ROUNDS, _BLOCK_SECONDS = 8, 0.3
# Layers that stay in the graph with which the original's time is compared.
_KEPT = (0,)
# Of each stack, its time in a request, and that of each of its layers, in milliseconds.
_Times = Mapping[Stack, tuple[float, float]]


@dataclass(frozen=True)
class Strategies:
    """The strategies of a build.

    Attributes:
        asked: Those of the recipe, named.
        kept: Those that only the bundle has.
        chosen: What strategies have chosen in earlier builds, as far as that still holds, by name.
    """

    asked: tuple[StrategyRecipe, ...]
    kept: tuple[StrategyRecipe, ...]
    chosen: Mapping[str, AssemblyRecipe]

    @property
    def all(self) -> tuple[StrategyRecipe, ...]:
        """All strategies."""
        return (*self.asked, *self.kept)

    @property
    def fresh(self) -> list[StrategyRecipe]:
        """Those that have to choose now."""
        return [entry for entry in self.all if entry.name not in self.chosen]


def read_strategies(
    recipe: Recipe, before: Recipe | None, modules: Sequence[ModulesPlan], old: BundleFiles | None
) -> Strategies:
    """The strategies of a recipe and of the bundle, and what they have chosen.

    A strategy of the recipe chooses anew if it has another budget or other modules. One that only the bundle
    has keeps its choice. An assembly of the recipe ends a strategy of the bundle that has its name.

    Args:
        recipe: The recipe to build now.
        before: The recipe that the bundle was built from; None if there is none.
        modules: The modules of the build, those of the bundle included.
        old: The bundle; None if there is none.

    Raises:
        UserError: A name is used twice.
    """
    asked = tuple(entry.resolved for entry in recipe.strategies)
    names = [str(entry.name) for entry in asked]
    specs = {} if old is None else {v.name: v.assembly_spec for v in old.manifest.variants}
    explicit = {entry.name: entry.spec for entry in recipe.assemblies}
    for name in names:
        if names.count(name) > 1 or explicit.get(name, specs.get(name)) != specs.get(name):
            raise UserError(
                f"Two assemblies have the name {name}, one of them chosen by a strategy.",
                "Give each a name of its own: name: in the recipe.",
            )
    kept = tuple(
        entry
        for entry in (() if before is None else before.strategies)
        if entry.name not in {*names, *explicit} and specs.get(str(entry.name)) is not None
    )
    chosen = {}
    for entry in (*asked, *kept):
        step = {} if old is None else old.manifest.steps.get(_step(entry), {})
        holds = entry in kept or step == _record(entry, recipe, modules, step.get("assembly"))
        if holds and (spec := step.get("assembly")) is not None:
            chosen[str(entry.name)] = AssemblyRecipe(spec=spec, name=entry.name)
    return Strategies(asked, kept, chosen)


def record_choices(
    context: BuildContext,
    strategies: Strategies,
    modules: Sequence[ModulesPlan],
    chosen: Mapping[str, AssemblyRecipe],
) -> None:
    """Store what each strategy has chosen, so that the next build measures nothing."""
    for entry in strategies.all:
        record = _record(entry, context.recipe, modules, chosen[str(entry.name)].spec)
        context.staged.steps[_step(entry)] = record


def _step(entry: StrategyRecipe) -> str:
    return f"strategy/{entry.name}"


def _record(
    entry: StrategyRecipe, recipe: Recipe, modules: Sequence[ModulesPlan], spec: str | None
) -> dict[str, Any]:
    """What a choice depends on, and the choice."""
    spans = {stack: [str(span) for span in found] for stack, found in _spans(modules).items()}
    float32 = list(recipe.quantization.float32_modules) if entry.max_weights is not None else []
    return {
        "strategy": entry.model_dump(mode="json"),
        "modules": spans,
        "float32_modules": float32,
        "assembly": spec,
    }


def _spans(modules: Sequence[ModulesPlan]) -> dict[Stack, list[Span]]:
    found: dict[Stack, list[Span]] = {}
    for plan in modules:
        found.setdefault(plan.config.stack, []).extend(group.span for group in plan.config.modules)
    return {stack: sorted(spans) for stack, spans in found.items()}


def check(
    context: BuildContext, strategies: Sequence[StrategyRecipe], modules: Sequence[ModulesPlan]
) -> None:
    """Check what can be checked before the trace.

    Raises:
        UserError: There are no modules, a name means another variant, or the precision cannot be timed on a
            CPU.
    """
    plugins = {plugin.name for plugin in context.recipe.plugins}
    for entry in strategies:
        if is_reserved(str(entry.name)) or entry.name in plugins:
            raise UserError(
                f"A strategy cannot have the name {entry.name}, which means another variant or file.",
                "Choose another name: name: in the recipe.",
            )
    if not modules:
        raise UserError(
            f"{strategies[0].name} needs modules to meet its budget.",
            "Give modules: --module DIR, or modules: in the recipe.",
        )
    precision = find_precision(context.recipe.precision)
    timed = [entry for entry in strategies if _is_timed(entry)]
    if timed and (precision.is_half or not precision.on_a_cpu):
        raise UserError(
            f"{precision.name} is not representative on a CPU, so {timed[0].name} cannot time layers.",
            "Choose the assembly in a float32 bundle, and give its specification here: --assembly SPEC; or "
            "give --max-weights alone.",
        )


def _is_timed(entry: StrategyRecipe) -> bool:
    return entry.speedup is not None or entry.strategy == "speed-first"


def choose(
    context: BuildContext, strategies: Sequence[StrategyRecipe], modules: Sequence[ModulesPlan]
) -> dict[str, AssemblyRecipe]:
    """Choose an assembly for each strategy, and report what it is expected to cost.

    The backbone must have been traced.

    Args:
        context: The build.
        strategies: The strategies, named.
        modules: The available modules.

    Returns:
        The assemblies by name.

    Raises:
        UserError: A budget cannot be met, or the original meets it.
    """
    context.staged.materialise()  # so that graphs that were reused can be timed
    times: dict[tuple[int, int], _Times] = {}
    found, rows = {}, {}
    for entry in strategies:
        assert entry.strategy is not None
        shape = entry.sequence_length, entry.new_tokens
        if _is_timed(entry) and shape not in times:
            times[shape] = _measure(context, *shape)
        cost = _cost(context, _spans(modules), times[shape] if _is_timed(entry) else None)
        choice = choose_assembly(
            cost, entry.strategy, speedup=entry.speedup, max_weight_bytes=entry.max_weight_bytes
        )
        if not choice.left_out:
            raise UserError(
                f"The original is within the budget of {entry.name}: it has "
                f"{cost.weight_bytes / 1e6:.1f} MB.",
                "Leave out the budget, or choose a smaller one.",
            )
        context.staged.progress.note(f"{entry.name}: {choice}")
        found[str(entry.name)] = AssemblyRecipe(spec=str(choice.assembly), name=entry.name)
        rows[str(entry.name)] = _row(cost, choice)
    old = context.staged.old
    before = read_report(old.path, STRATEGY_REPORT) if old is not None else None
    report = context.staged.folder / STRATEGY_REPORT
    report.parent.mkdir(exist_ok=True)
    measured = {name: {**row, "machine": machine()} for name, row in rows.items()}
    write_json(report, {**(before or {}), **measured})
    return found


def _row(cost: Cost, choice: Choice) -> dict[str, Any]:
    timed = {
        "expected_speedup": None if choice.speedup is None else round(choice.speedup, 3),
        "request_ms": cost.request_ms,
        "layer_ms": {stack: round(own.layer_ms, 4) for stack, own in cost.stacks.items()},
    }
    return {
        "assembly": str(choice.assembly),
        "weight_bytes": choice.weight_bytes,
        **(timed if cost.request_ms is not None else {}),
    }


def _cost(context: BuildContext, spans: Mapping[Stack, Sequence[Span]], times: _Times | None) -> Cost:
    """What the original costs."""
    from variator_export.model.modular.assembled import layers_of, own_state

    backbone, info = context.backbone, context.info
    stacks = {
        stack: StackCost(
            num_layers,
            0.0 if times is None else times[stack][1],
            _bytes(own_state(info.spec.family, layers_of(backbone, stack)[-1])),
            spans.get(stack, ()),
        )
        for stack, num_layers in info.stack_layers.items()
    }
    whole = None if times is None else round(sum(request for request, _ in times.values()), 3)
    return Cost(whole, _bytes(backbone.model.state_dict()), stacks)


def _bytes(state: Mapping[str, Any]) -> int:
    """The size of tensors, of which some have several names."""
    tensors = {(tensor.data_ptr(), tuple(tensor.shape)): tensor for tensor in state.values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def _measure(context: BuildContext, length: int, new_tokens: int) -> _Times:
    """The times of the stacks in a request.

    The graph of the original is timed in turns with one that has its first layer alone. No layer of a stack
    of one layer can be left out.
    """
    found: dict[Stack, tuple[float, float]] = {}
    for stack, num_layers in context.info.stack_layers.items():
        inputs, steps = _inputs(context, stack, num_layers, length, new_tokens)
        calls = {"original": partial(_runner(context, stack, None), inputs)}
        if num_layers > len(_KEPT):
            few, _ = _inputs(context, stack, len(_KEPT), length, new_tokens)
            calls["short"] = partial(_runner(context, stack, _KEPT), few)
        with context.staged.progress.bar(f"time {stack} layers", len(calls) * _ROUNDS) as advance:
            timings, _ = time_in_turns(
                calls, block_seconds=_BLOCK_SECONDS, max_rounds=_ROUNDS, progress=advance
            )
        whole, rest = timings["original"].median_ms, timings[list(calls)[-1]].median_ms
        found[stack] = steps * whole, steps * (whole - rest) / max(num_layers - len(_KEPT), 1)
    return found


def _runner(
    context: BuildContext, stack: Stack, kept: Sequence[int] | None
) -> Callable[[Mapping[str, np.ndarray]], object]:
    """The graph with a stack, with some of its layers; None for all."""
    from variator_export.graph.assemblies.variant import leave_out_layers
    from variator_export.graph.bind import bind_baseline_loaded
    from variator_export.graph.defaults import load_without_defaults

    folder = context.staged.folder
    name = context.any_ratio if stack == ENCODER_STACK else context.traced[DECODER]
    model: ir.Model = load_without_defaults(folder / name)
    if kept is not None:
        leave_out_layers(model, context.info, stack, kept)
    if stack == ENCODER_STACK:
        model = bind_baseline_loaded(model)
    return open_changed(model, folder, {}, context.recipe.precision).run


def _inputs(
    context: BuildContext, stack: Stack, layers: int, length: int, new_tokens: int
) -> tuple[dict[str, np.ndarray], int]:
    """Inputs of a graph with so many layers, and how often it runs for a request."""
    info = context.info
    length = min(length, info.max_length or length)
    if stack == ENCODER_STACK:
        return speed_inputs(info.spec.family.inputs, info.config.vocab_size, 1, length), 1
    size = info.decoder_size
    assert size is not None
    # Half of the generated tokens are there, as they are on average.
    tokens = {"decoder": new_tokens // 2, "encoder": length}
    arrays = {
        past_name(layer, of, kind): np.zeros((1, size.num_heads, tokens[of], size.head_size), np.float32)
        for layer in range(layers)
        for of in tokens
        for kind in KINDS
    }
    arrays |= {ENCODER_MASK: np.ones((1, length), np.int64), "input_ids": np.ones((1, 1), np.int64)}
    return arrays, new_tokens
