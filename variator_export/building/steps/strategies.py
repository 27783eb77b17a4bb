"""The step of a build that chooses assemblies for budgets: what each layer weighs and costs is measured."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.benchmark.speed_table import speed_inputs
from variator_export.benchmark.timing import time_in_turns
from variator_export.building.context import BuildContext
from variator_export.building.plan_modular import ModulesPlan
from variator_export.bundle.files import BundleFiles
from variator_export.core.assembly import ENCODER_STACK, Span, Stack
from variator_export.core.axes import ENCODER_MASK, KINDS, past_name
from variator_export.core.environment import machine
from variator_export.core.errors import UserError
from variator_export.core.json_file import write_json
from variator_export.core.parts import DECODER
from variator_export.core.precision import find_precision
from variator_export.core.strategy import Choice, Cost, StackCost, choose_assembly
from variator_export.recipe.assemblies import AssemblyRecipe, StrategyRecipe
from variator_export.verification.verified_graph import open_changed

if TYPE_CHECKING:
    import onnx_ir as ir

STRATEGY_REPORT = "reports/strategies.json"
_ROUNDS, _BLOCK_SECONDS = 8, 0.3
# Layers that stay in the graph with which the original's time is compared.
_KEPT = (0,)


def strategies_of(asked: Sequence[StrategyRecipe], old: BundleFiles | None) -> tuple[StrategyRecipe, ...]:
    """The strategies of a recipe, named, and those that the bundle already has.

    Raises:
        UserError: A name is used twice.
    """
    named = [entry.resolved for entry in asked]
    names = [entry.name for entry in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"Two strategies have the name {twice[0]}.", "Give each a name of its own: name: in the recipe."
        )
    before = [] if old is None else old.manifest.recipe.get("strategies") or []
    kept = [entry for entry in map(StrategyRecipe.model_validate, before) if entry.name not in names]
    return (*named, *kept)


def chosen_before(
    strategies: Sequence[StrategyRecipe],
    modules: Sequence[ModulesPlan],
    old: BundleFiles | None,
) -> dict[str, AssemblyRecipe]:
    """The assemblies that strategies have chosen in an earlier build, from the same modules, by name."""
    found = {}
    for entry in strategies:
        step = {} if old is None else old.manifest.steps.get(_step(entry), {})
        spec = step.get("assembly")
        if spec is not None and step == {**_depends_on(entry, modules), "assembly": spec}:
            found[str(entry.name)] = AssemblyRecipe(spec=spec, name=entry.name)
    return found


def record_choices(
    context: BuildContext,
    strategies: Sequence[StrategyRecipe],
    modules: Sequence[ModulesPlan],
    chosen: Mapping[str, AssemblyRecipe],
) -> None:
    """Store what each strategy has chosen, so that the next build measures nothing."""
    for entry in strategies:
        spec = chosen[str(entry.name)].spec
        context.staged.steps[_step(entry)] = {**_depends_on(entry, modules), "assembly": spec}


def _step(entry: StrategyRecipe) -> str:
    return f"strategy/{entry.name}"


def _depends_on(entry: StrategyRecipe, modules: Sequence[ModulesPlan]) -> dict[str, Any]:
    return {
        "strategy": entry.model_dump(mode="json"),
        "modules": {f"{stack} {span}": True for stack, spans in _spans(modules).items() for span in spans},
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
        UserError: There are no modules, or the precision cannot be timed on a CPU.
    """
    if not modules:
        raise UserError(
            f"The budget of {strategies[0].name} needs modules to meet it with.",
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
    found, rows = {}, {}
    for entry in strategies:
        assert entry.strategy is not None
        cost = _cost(context, entry, _spans(modules))
        choice = choose_assembly(
            cost, entry.strategy, speedup=entry.speedup, max_weight_bytes=entry.max_weight_bytes
        )
        if not choice.left_out:
            raise UserError(
                f"The original is within the budget of {entry.name}: it has "
                f"{cost.weight_bytes / 1e6:.1f} MB.",
                "Leave out the budget, or ask for less.",
            )
        context.staged.progress.note(
            f"{entry.name}: {choice.assembly}, expected to be {choice.speedup:.2f}x faster, with "
            f"{choice.weight_bytes / 1e6:.1f} MB of weights"
        )
        found[str(entry.name)] = AssemblyRecipe(spec=str(choice.assembly), name=entry.name)
        rows[str(entry.name)] = _row(cost, choice)
    report = context.staged.folder / STRATEGY_REPORT
    report.parent.mkdir(exist_ok=True)
    write_json(report, {"machine": machine(), "strategies": rows})
    return found


def _row(cost: Cost, choice: Choice) -> dict[str, Any]:
    return {
        "assembly": str(choice.assembly),
        "expected_speedup": round(choice.speedup, 3),
        "weight_bytes": choice.weight_bytes,
        "request_ms": round(cost.request_ms, 3),
        "layer_ms": {stack: round(own.layer_ms, 4) for stack, own in cost.stacks.items()},
    }


def _cost(context: BuildContext, entry: StrategyRecipe, spans: Mapping[Stack, Sequence[Span]]) -> Cost:
    """What the original costs; times are 0 if no budget needs them."""
    from variator_export.model.modular.assembled import layers_of, own_state

    backbone, info = context.backbone, context.info
    times: dict[Stack, tuple[float, float]] = dict.fromkeys(info.stack_layers, (0.0, 0.0))
    if _is_timed(entry):
        times = _measure(context, entry)
    stacks = {
        stack: StackCost(
            num_layers,
            times[stack][1],
            _bytes(own_state(info.spec.family, layers_of(backbone, stack)[-1])),
            spans.get(stack, ()),
        )
        for stack, num_layers in info.stack_layers.items()
    }
    whole = sum(request for request, _ in times.values())
    return Cost(whole, _bytes(backbone.model.state_dict()), stacks)


def _bytes(state: Mapping[str, Any]) -> int:
    """The size of tensors, of which some have several names."""
    tensors = {(tensor.data_ptr(), tuple(tensor.shape)): tensor for tensor in state.values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def _measure(context: BuildContext, entry: StrategyRecipe) -> dict[Stack, tuple[float, float]]:
    """For each stack, its time in a request, and that of each of its layers, in milliseconds.

    The graph of the original is timed in turns with one that has its first layer alone.
    """
    found: dict[Stack, tuple[float, float]] = {}
    for stack, num_layers in context.info.stack_layers.items():
        inputs, steps = _inputs(context, entry, stack, num_layers)
        few, _ = _inputs(context, entry, stack, len(_KEPT))
        original, short = (_runner(context, stack, kept) for kept in (None, _KEPT))
        calls = {"original": partial(original, inputs), "short": partial(short, few)}
        with context.staged.progress.bar(f"time {stack} layers", 2 * _ROUNDS) as advance:
            timings, _ = time_in_turns(
                calls, block_seconds=_BLOCK_SECONDS, max_rounds=_ROUNDS, progress=advance
            )
        whole, rest = (timings[name].median_ms for name in calls)
        found[stack] = steps * whole, steps * (whole - rest) / (num_layers - len(_KEPT))
    return found


def _runner(
    context: BuildContext, stack: Stack, kept: Sequence[int] | None
) -> Callable[[Mapping[str, np.ndarray]], object]:
    """The graph with a stack, with some of its layers; None for all."""
    from variator_export.graph.assemble_variant import leave_out_layers
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
    context: BuildContext, entry: StrategyRecipe, stack: Stack, layers: int
) -> tuple[dict[str, np.ndarray], int]:
    """Inputs of a graph with so many layers, and how often it runs for a request."""
    info = context.info
    length = min(entry.sequence_length, info.max_length or entry.sequence_length)
    if stack == ENCODER_STACK:
        return speed_inputs(info.spec.family.inputs, info.config.vocab_size, 1, length), 1
    size = info.decoder_size
    assert size is not None
    # Half of the generated tokens are there, as they are on average.
    tokens = {"decoder": entry.new_tokens // 2, "encoder": length}
    arrays = {
        past_name(layer, of, kind): np.zeros((1, size.num_heads, tokens[of], size.head_size), np.float32)
        for layer in range(layers)
        for of in tokens
        for kind in KINDS
    }
    arrays |= {ENCODER_MASK: np.ones((1, length), np.int64), "input_ids": np.ones((1, 1), np.int64)}
    return arrays, entry.new_tokens
