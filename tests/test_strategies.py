"""Strategies: assemblies that are chosen for a budget."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from hypothesis import given
from hypothesis import strategies as st
from test_assemble import random_modules

from variator_export.building.recipe_build import build
from variator_export.building.steps import strategies as step
from variator_export.core.assembly import DECODER_STACK, ENCODER_STACK, possible_spans
from variator_export.core.errors import UserError
from variator_export.core.strategy import (
    Cost,
    StackCost,
    best_by_left_out,
    choose_assembly,
    parse_size,
)
from variator_export.model.backbone import Backbone
from variator_export.model.modular.layout import even_groups
from variator_export.model.modular.weights import save_modules
from variator_export.recipe.assemblies import ModulesRecipe, StrategyRecipe
from variator_export.recipe.recipe import Recipe
from variator_export.sessions import Bundle


def _cost(
    layers: tuple[int, int], granularities: set[int], ms: tuple[float, float], sizes: tuple[int, int]
) -> Cost:
    stacks = {
        stack: StackCost(
            count, layer_ms, size, {group.span for g in granularities for group in even_groups(count, g)}
        )
        for stack, count, layer_ms, size in zip(
            (ENCODER_STACK, DECODER_STACK), layers, ms, sizes, strict=True
        )
    }
    whole = sum(own.num_layers * own.layer_ms for own in stacks.values())
    weights = sum(own.num_layers * own.layer_bytes for own in stacks.values())
    return Cost(whole + 1.0, weights + 100, stacks)


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.sets(st.integers(2, 4)),
    st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.floats(1.01, 4),
    st.sampled_from(["speed-first", "size-first"]),
)
def test_no_assembly_within_the_budget_leaves_out_fewer_layers(
    layers: tuple[int, int],
    granularities: set[int],
    ms: tuple[float, float],
    sizes: tuple[int, int],
    speedup: float,
    strategy: Any,
) -> None:
    cost = _cost(layers, granularities, ms, sizes)
    every = []
    for spans in itertools.product(
        *(possible_spans(own.num_layers, own.modules) for own in cost.stacks.values())
    ):
        left_out = [
            own.num_layers - len(found) for own, found in zip(cost.stacks.values(), spans, strict=True)
        ]
        saved = sum(n * own.layer_ms for n, own in zip(left_out, cost.stacks.values(), strict=True))
        weights = sum(n * own.layer_bytes for n, own in zip(left_out, cost.stacks.values(), strict=True))
        every.append(
            (sum(left_out), cost.request_ms / (cost.request_ms - saved), cost.weight_bytes - weights)
        )
    within = [found for found in every if found[1] >= speedup]
    if not within:
        with pytest.raises(UserError, match="No assembly of these modules is"):
            choose_assembly(cost, strategy, speedup=speedup)
        return
    choice = choose_assembly(cost, strategy, speedup=speedup)
    fewest = min(within)[0]
    assert choice.left_out == fewest
    equal = [found for found in within if found[0] == fewest]
    if strategy == "speed-first":
        assert choice.speedup == pytest.approx(max(found[1] for found in equal))
    else:
        assert choice.weight_bytes == min(found[2] for found in equal)
    for stack, own in cost.stacks.items():
        spans_of = choice.assembly.spans(stack, own.num_layers)
        assert all(span.granularity == 1 or span in own.modules for span in spans_of)


@given(st.integers(1, 9), st.sets(st.integers(2, 4)))
def test_small_modules_come_first_and_the_last_layers(num_layers: int, granularities: set[int]) -> None:
    modules = {group.span for g in granularities for group in even_groups(num_layers, g)}
    found = best_by_left_out(num_layers, modules)
    every: dict[int, list[tuple[int, ...]]] = {}
    for spans in possible_spans(num_layers, modules):
        sizes = tuple(span.granularity for span in spans)
        every.setdefault(num_layers - len(sizes), []).append(sizes)
    assert found == {
        left_out: min(listed, key=lambda sizes: (sum(s**2 for s in sizes), sizes))
        for left_out, listed in every.items()
    }


def test_the_decoder_is_first_where_its_layers_take_longest() -> None:
    cost = _cost((6, 6), {2}, (1.0, 3.0), (70, 90))
    choice = choose_assembly(cost, "speed-first", speedup=1.2)
    assert str(choice.assembly) == "dec=1x2,2x2"
    small = _cost((6, 6), {2}, (1.0, 3.0), (90, 70))
    assert str(choose_assembly(small, "size-first", max_weight_bytes=900).assembly) == "enc=1x2,2x2"
    with pytest.raises(
        UserError, match=r"The best is enc=2x3;dec=2x3, with 0.0 MB of weights, expected to be 1.92x"
    ):
        choose_assembly(cost, "speed-first", speedup=3)


def test_sizes_are_read() -> None:
    assert [parse_size(text) for text in ("150MB", "1.5 GiB", "12B", "3 kB")] == [
        150_000_000,
        1_610_612_736,
        12,
        3000,
    ]
    for text in ("150", "MB", "-1MB", "1,5MB", ""):
        with pytest.raises(UserError, match="is not a size"):
            parse_size(text)


def test_a_strategy_needs_a_budget() -> None:
    with pytest.raises(ValueError, match="give a budget"):
        StrategyRecipe(strategy="size-first")
    assert StrategyRecipe(speedup=2).resolved.name == "speed-first-2x"
    assert StrategyRecipe(max_weights="150 MB").resolved.name == "size-first-150MB"


@pytest.fixture(scope="module")
def text_modules(tmp_path_factory: pytest.TempPathFactory, load_model: Callable[..., Backbone]) -> Path:
    folder = tmp_path_factory.mktemp("modules")
    backbone = load_model("t5-text", 4)
    save_modules(random_modules(backbone, 2), folder / "enc")
    save_modules(random_modules(backbone, 2, DECODER_STACK), folder / "dec")
    return folder


def _recipe(model: Path, modules: Path, *strategies: dict[str, Any], **changes: Any) -> Recipe:
    content = {
        "name": "small",
        "backbone": {"source": str(model)},
        "modules": [{"source": str(modules / name)} for name in ("enc", "dec")],
        "strategies": list(strategies),
        "speed": None,
    }
    return Recipe.model_validate(content | changes)


def test_a_budget_is_met_once_and_remembered(
    tmp_path: Path,
    small_model: Callable[..., Path],
    load_model: Callable[..., Backbone],
    text_modules: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model("t5-text", 4)
    state = load_model("t5-text", 4).model.state_dict()
    size = sum({tensor.data_ptr(): tensor.nbytes for tensor in state.values()}.values())
    fast = {"speedup": 1.05, "sequence_length": 16, "new_tokens": 4}
    small = {"max_weights": f"{size - 1}B", "name": "small"}
    folder = tmp_path / "bundle"
    build(_recipe(model, text_modules, fast, small), folder)
    manifest = Bundle.load(folder).manifest
    chosen = {v.name: v.assembly_spec for v in manifest.variants}
    assert set(chosen) == {"ratio-1", "speed-first-1.05x", "small"}
    assert chosen["small"] in ("enc=1x2,2", "dec=1x2,2,1")
    report = json.loads((folder / "reports/strategies.json").read_text())
    assert report["speed-first-1.05x"]["expected_speedup"] >= 1.05
    assert report["speed-first-1.05x"]["layer_ms"].keys() == {"encoder", "decoder"}
    assert report["small"]["weight_bytes"] < size
    assert "expected_speedup" not in report["small"]

    def refuse(*_arguments: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(step, "choose", refuse)
    again = build(_recipe(model, text_modules, fast, small), folder)
    assert not again.published
    # The bundle's own stay as they are, even if there are other modules.
    save_modules(random_modules(load_model("t5-text", 4), 3), tmp_path / "g3")
    more = _recipe(model, text_modules).model_copy(
        update={"modules": (ModulesRecipe(source=str(tmp_path / "g3")),)}
    )
    kept = build(more, folder)
    assert {v.name: v.assembly_spec for v in Bundle.load(kept.bundle).manifest.variants} == chosen
    monkeypatch.undo()
    # Another budget is measured with the graphs that are there, and its report joins the others.
    slower = build(
        _recipe(model, text_modules, {"speedup": 1.01, "sequence_length": 16, "new_tokens": 4}), folder
    )
    assert {v.name for v in Bundle.load(slower.bundle).manifest.variants} == {*chosen, "speed-first-1.01x"}
    found = json.loads((folder / "reports/strategies.json").read_text())
    assert set(found) == {"speed-first-1.05x", "small", "speed-first-1.01x"}
    # An assembly of that name takes the place of a choice.
    named = _recipe(model, text_modules, assemblies=[{"name": "small", "spec": "enc=2x2"}])
    build(named, folder)
    assert Bundle.load(folder).variant("small").assembly_spec == "enc=2x2"
    assert "small" not in {entry["name"] for entry in Bundle.load(folder).manifest.recipe["strategies"]}


def test_budgets_that_cannot_be_met_are_refused(
    tmp_path: Path, small_model: Callable[..., Path], text_modules: Path
) -> None:
    model = small_model("t5-text", 4)
    output = tmp_path / "out"
    for recipe, words in (
        (_recipe(model, text_modules, {"max_weights": "1kB"}), "No assembly of these modules is at most"),
        (_recipe(model, text_modules, {"max_weights": "1GB"}), "The original is within the budget"),
        (
            _recipe(model, text_modules, {"speedup": 2}).model_copy(update={"modules": ()}),
            "needs modules to meet its budget",
        ),
        (_recipe(model, text_modules, {"speedup": 2}, precision="float16"), "not representative on a CPU"),
        (_recipe(model, text_modules, {"speedup": 2}, {"speedup": 2}), "Two assemblies have the name"),
        (
            _recipe(
                model,
                text_modules,
                {"speedup": 2, "name": "a"},
                assemblies=[{"name": "a", "spec": "enc=2x2"}],
            ),
            "Two assemblies have the name a",
        ),
        (_recipe(model, text_modules, {"speedup": 2, "name": "ratio-4"}), "cannot have the name ratio-4"),
    ):
        with pytest.raises(UserError, match=words):
            build(recipe, output)
        assert not output.exists()


def test_the_command_line_chooses(
    tmp_path: Path, small_model: Callable[..., Path], text_modules: Path
) -> None:
    options = ["--backbone", str(small_model("t5-text", 4)), "--output", str(tmp_path / "out"), "--no-speed"]
    options += ["--target", "onnxruntime"]
    wrong = call("build", *options, "--strategy", "size-first")
    assert wrong.returncode == 2
    assert "needs a budget" in wrong.stderr
    done = call("build", *options, "--module", str(text_modules / "dec"), "--speedup", "1.0001")
    assert done.returncode == 0, done.stderr
    assert "speed-first-1.0001x: dec=1x2,2,1, with" in done.stderr.replace("\n", " ")
