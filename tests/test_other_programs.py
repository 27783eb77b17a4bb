"""Graphs in programs that know nothing of bundles: model.onnx, default values, adapters, opset 20."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from artefacts import Artefacts
from command_line import call
from conftest import MODELS, plugin_for
from stored_traces import Trace

from variator_export.building.recipe_build import BuildResult, build
from variator_export.building.steps import forms
from variator_export.core.errors import NumbersDisagreeError, UserError
from variator_export.core.parts import MODEL
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.graph.bind import bind, bind_baseline
from variator_export.model.backbone import Backbone
from variator_export.model.plugin_file import save_plugin
from variator_export.model.plugin_layout import stack_for_graph
from variator_export.recipe.recipe import GraphsRecipe, Recipe
from variator_export.sessions import Bundle
from variator_export.verification.judging.compare import deviation

ADAPTER = "ratio-4.onnx_adapter"


@pytest.fixture(scope="session")
def recipe(small_recipe: Recipe) -> Recipe:
    """Plugins of both masking modes, everything on."""
    plugins = [
        {"ratio": 2, "initialise": {"seed": 2, "bottleneck_size": 5}},
        {"ratio": 4, "initialise": {"seed": 4, "bottleneck_size": 5, "masking": "exclude-padding"}},
    ]
    graphs = {"default_variant": 4, "adapters": True}
    return Recipe.model_validate({**small_recipe.model_dump(), "plugins": plugins, "graphs": graphs})


@pytest.fixture(scope="session")
def made(artefacts: Artefacts, recipe: Recipe) -> Path:
    """A bundle with adapters whose default is ratio 4; not to be changed."""
    return artefacts.folder("bundles/other-programs", lambda folder: build(recipe, folder))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def rows(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Three rows of 13 tokens; the second ends in padding."""
    rng = np.random.default_rng(0)
    values = {name: np.ones((3, 13), np.int64) for name in names}
    values["input_ids"] = rng.integers(1000, 30000, (3, 13))
    values["attention_mask"][1, 6:] = 0
    return values


def test_any_program_runs_the_default_variant_as_model_onnx(made: Path) -> None:
    bundle = Bundle.load(made)
    assert (made / "model.onnx").read_bytes() == (made / "ratio-4.onnx").read_bytes()
    inputs = rows(bundle.manifest.backbone.inputs)
    found = onnxruntime.InferenceSession(made / "model.onnx").run(None, inputs)
    session = bundle.session()
    default, chosen = (session.run(inputs, ratio)["last_hidden_state"] for ratio in (None, 4))
    assert np.array_equal(default, chosen)
    assert np.abs(chosen - found[0]).max() < 5e-6
    assert np.abs(session.run(inputs, 1)["last_hidden_state"] - found[0]).max() > 1e-3


def test_run_takes_the_default_variant(made: Path) -> None:
    shown = [
        json.loads(call("run", str(made), "--text", "Seven.", "--format", "json", *ratio).stdout)
        for ratio in ((), ("--ratio", "4"), ("--ratio", "1"))
    ]
    assert shown[0] == shown[1] != shown[2]


def test_the_any_ratio_graph_runs_as_ratio_1_without_a_plugin(made: Path) -> None:
    onnx.checker.check_model(made / "any-ratio.onnx", full_check=True)
    session = onnxruntime.InferenceSession(made / "any-ratio.onnx")
    names = tuple(value.name for value in session.get_inputs())
    assert names == Bundle.load(made).manifest.backbone.inputs, "plugin inputs are optional"
    expected = onnxruntime.InferenceSession(made / "ratio-1.onnx").run(None, rows(names))
    assert np.abs(session.run(None, rows(names))[0] - expected[0]).max() < 5e-6


@pytest.mark.parametrize("ratio", [2, 4])
def test_onnxruntime_loads_a_plugin_as_an_adapter(made: Path, ratio: int) -> None:
    session = onnxruntime.InferenceSession(made / "any-ratio.onnx")
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(made / f"ratio-{ratio}.onnx_adapter"))
    options.add_active_adapter(adapter)
    inputs = rows(Bundle.load(made).manifest.backbone.inputs)
    expected = onnxruntime.InferenceSession(made / f"ratio-{ratio}.onnx").run(None, inputs)
    assert np.abs(session.run(None, inputs, options)[0] - expected[0]).max() < 5e-6
    assert np.abs(session.run(None, inputs)[0] - expected[0]).max() > 1e-3, "only calls that name the adapter"


def test_an_adapter_that_is_not_the_plugin_is_not_published(
    recipe: Recipe, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = forms.write_adapter

    def swap_masking(arrays: dict[str, np.ndarray], path: Path) -> None:
        write({n: 1 - a if n == "plugin.exclude_padding" else a for n, a in arrays.items()}, path)

    monkeypatch.setattr(forms, "write_adapter", swap_masking)
    monkeypatch.setattr(forms, "_MADE_BY", ("core/axes.py",))
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(NumbersDisagreeError, match=r"ratio-2\.onnx_adapter: .* differs"):
        build(recipe, copy)
    assert (copy / "manifest.json").read_bytes() == before


def test_what_a_recipe_leaves_open_stays_as_the_bundle_has_it(recipe: Recipe, copy: Path) -> None:
    def reused(result: BuildResult) -> bool:
        return all(step.action == "reused" for step in result.steps)

    open_recipe = recipe.model_copy(update={"graphs": GraphsRecipe()})
    result = build(open_recipe, copy)
    assert reused(result)
    assert not result.published
    result = build(
        recipe.model_copy(update={"graphs": GraphsRecipe(adapters=False, default_variant=1)}), copy
    )
    bundle = Bundle.load(copy)
    assert bundle.manifest.default_variant == "ratio-1"
    assert (copy / "model.onnx").read_bytes() == (copy / "ratio-1.onnx").read_bytes()
    assert ADAPTER not in bundle.manifest.files
    assert not (copy / ADAPTER).exists()


def test_a_default_that_is_no_variant_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.model_copy(update={"graphs": GraphsRecipe(default_variant=3)})
    with pytest.raises(UserError, match=r"The default variant is 3; no variant matches: ratio-1 \(ratio 1\)"):
        build(recipe, tmp_path / "new")


def test_the_flags(made: Path) -> None:
    result = call("build", "--opset", "20", "--default-variant", "4", "--adapters", "--show-recipe")
    shown = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert {
        "opset: 20 # --opset",
        "default_variant: 4 # --default-variant",
        "adapters: true # --adapters",
    } < {*shown}
    assert "default_variant: news" in call("build", "--default-variant", "news", "--show-recipe").stdout
    refused = call("build", "--opset", "22", "--show-recipe")
    assert (refused.returncode, "graphs.opset" in refused.stderr) == (1, True), refused.stderr
    assert "opset 23; model.onnx is ratio-4" in call("inspect", str(made)).stdout


@pytest.mark.parametrize("model", MODELS)
def test_graphs_of_opset_20_equal_those_of_opset_23(
    load_model: Callable[[str], Backbone], trace: Trace, tmp_path: Path, model: str
) -> None:
    backbone = load_model(model)
    plugin = plugin_for(backbone, 3)
    runners: dict[int, dict[str, OnnxRuntimeRunner]] = {}
    for opset in (20, 23):
        folder = tmp_path / str(opset)
        folder.mkdir()
        any_ratio = folder / "any-ratio.onnx"
        ir.save(trace(backbone, folder, "weights.safetensors", opset)[MODEL], any_ratio)
        save_plugin(plugin, folder / "plugin")
        ir.save(bind_baseline(any_ratio), folder / "1.onnx")
        ir.save(bind(any_ratio, plugin.config, "plugin/plugin.safetensors"), folder / "3.onnx")
        runners[opset] = {
            "1": OnnxRuntimeRunner(folder / "1.onnx"),
            "3": OnnxRuntimeRunner(folder / "3.onnx"),
            "any": OnnxRuntimeRunner(any_ratio, stack_for_graph(plugin)),
        }
        for file in folder.glob("*.onnx"):
            loaded = onnx.load(file, load_external_data=False)
            assert {i.domain: i.version for i in loaded.opset_import} == {"": opset}
            assert loaded.ir_version <= 10
            onnx.checker.check_model(file, full_check=True)
    inputs = rows(backbone.spec.family.inputs)
    for name, runner in runners[20].items():
        for output, expected in runners[23][name].run(inputs).items():
            assert deviation(runner.run(inputs)[output], expected).relative_frobenius < 2e-6, (name, output)
