"""Half precision: graphs, weights and engines in float16 and bfloat16, and the proof that they are."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from artefacts import Artefacts
from command_line import call
from conftest import MODELS, Notes, plugin_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from signed import sign
from stored_traces import Trace

from variator_export import Bundle, NumbersDisagreeError, UserError, build
from variator_export.building.recipe_build import default_bundle
from variator_export.core.parts import MODEL
from variator_export.core.precision import find_precision
from variator_export.engines.eager import EagerModel
from variator_export.engines.request import EngineRequest, Profile
from variator_export.engines.tensorrt.building.builder_process import build_engine
from variator_export.graph.bind import bind
from variator_export.graph.macs import precision_share
from variator_export.model.backbone import Backbone
from variator_export.model.families import architectures
from variator_export.model.plugin_file import load_plugin, save_plugin
from variator_export.recipe.recipe import Recipe
from variator_export.verification.bundle_verification import verify
from variator_export.verification.verified_graph import WIDENED

# Of each kind: post-norm; T5 with its float32 module and its norms; rotated heads with a softmax in float32.
CASES = [("bert", "float16"), ("t5-v1.0", "float16"), ("modernbert", "bfloat16")]
# One of each family; what CASES has is built there with everything around it.
FAMILIES = [
    (model, precision)
    for model in MODELS
    if model not in ("bert-classifier", "t5-v1.1", "xlm-roberta")
    for precision in ("float16", "bfloat16")
]
WO = "wo"


@pytest.fixture(scope="module")
def half(artefacts: Artefacts, half_recipe: Callable[..., Recipe]) -> Callable[[str, str], Path]:
    """A verified bundle in half precision with an engine, by model and precision."""

    def find(model: str, precision: str) -> Path:
        profile = {"batch_size": [1, 2, 4], "sequence_length": [1, 16, 64]}
        recipe = half_recipe(
            model,
            precision,
            targets=["onnxruntime", "tensorrt-rtx"],
            engine={"profiles": {"small": profile}},
        )
        return artefacts.folder(f"half/{model}-{precision}", lambda folder: build(recipe, folder))

    return find


@pytest.mark.parametrize(("model", "precision"), [case for case in FAMILIES if case not in CASES])
def test_an_engine_can_be_built_of_every_family_in_half_precision(
    load_model: Callable[..., Backbone], trace: Trace, tmp_path: Path, model: str, precision: str
) -> None:
    # The builder sees every operator of the family in one layer.
    backbone = load_model(model, layers=1).in_precision(find_precision(precision))
    ir.save(trace(backbone, tmp_path, "weights.safetensors")[MODEL], tmp_path / "any-ratio.onnx")
    plugin = plugin_for(backbone, 2)
    save_plugin(plugin, tmp_path / "plugin")
    ir.save(
        bind(tmp_path / "any-ratio.onnx", plugin.config, "plugin/plugin.safetensors"), tmp_path / "2.onnx"
    )
    shapes = dict.fromkeys(backbone.spec.family.inputs, ((1, 1), (2, 16), (4, 64)))
    profiles = (Profile(name="default", shapes=shapes),)
    request = EngineRequest(target="tensorrt-rtx", graph="2.onnx", what="ratio-2", profiles=profiles)
    built = build_engine(request, tmp_path)
    assert built.content
    # Heads of 8 are too small for a fused kernel. DeBERTa's attention is no operator.
    assert built.attention == (None if model.startswith("deberta") else "decomposed")


@pytest.mark.parametrize(("precision", "stays"), [("float16", True), ("bfloat16", False)])
def test_the_build_says_what_stays_in_float32(
    half_recipe: Callable[..., Recipe], tmp_path: Path, precision: str, stays: bool
) -> None:
    progress = Notes()
    build(half_recipe("t5-v1.0", precision, targets=["onnxruntime"]), tmp_path / "t5", progress=progress)
    found = [note for note in progress.notes if note.startswith("wo stays in float32")]
    assert len(found) == stays
    assert not stays or "--precision bfloat16 has none of them" in found[0]


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_graphs_weights_and_engines_are_in_the_precision(
    half: Callable[[str, str], Path], model: str, precision: str
) -> None:
    folder = half(model, precision)
    bundle = Bundle.load(folder)
    wanted = {"float16": "F16", "bfloat16": "BF16"}[precision]
    with safe_open(folder / "weights.safetensors", framework="np") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    floating = {name: kind for name, kind in types.items() if kind.startswith(("F", "BF"))}
    kept = {name for name in floating if f".{WO}." in name} if model == "t5-v1.0" else set()
    assert {name for name, kind in floating.items() if kind != wanted} == kept
    for variant in bundle.manifest.variants:
        proof = variant.precision_proof
        # A plugin reads the output of T5's `wo`, which exceeds float16, in float32 too.
        assert proof.macs == 1.0 if variant.baseline or not kept else 0.99 < proof.macs < 1.0
        assert {name.rpartition(".")[2] for name in proof.float32_modules} == ({WO} if kept else set())
        graph = ir.load(folder / variant.graph).graph
        assert {str(value.dtype) for value in graph.outputs} == {"FLOAT"}
        assert {str(value.dtype) for value in graph.inputs} == {"INT64"}
    (entry,) = bundle.engines("tensorrt-rtx", "ratio-2")
    sidecar = json.loads(bundle.file(entry.sidecar).read_text())
    assert (entry.precision, sidecar["precision"]) == (precision, precision)
    assert sidecar["precision_proof"]["macs"] == bundle.variant(2).precision_proof.macs


def test_a_session_in_float16_gives_float32_near_eager(
    half: Callable[[str, str], Path], load_model: Callable[[str], Backbone]
) -> None:
    bundle = Bundle.load(half("bert", "float16"))
    backbone = bundle.manifest.backbone
    inputs = bundle.text_encoder().encode(
        ["The ferry leaves at seven."], backbone.inputs, backbone.max_length
    )
    exact = EagerModel(load_model("bert"), load_plugin(bundle.path / "plugins" / "ratio-2")).run(inputs)
    for found in (bundle.session().run(inputs, ratio=2), bundle.session(variant=2).run(inputs)):
        for name, array in found.items():
            assert array.dtype == np.float32
            error = np.linalg.norm(array - exact[name]) / np.linalg.norm(exact[name])
            assert 1e-5 < error < 1e-2, "rounded, and no more than that"


def test_a_time_in_half_precision_on_a_cpu_says_what_it_is(half: Callable[[str, str], Path]) -> None:
    command = ["bench", str(half("bert", "float16")), "--runtime", "onnxruntime", "--shape", "1x8"]
    result = call(*command, "--openings", "1", "--block-seconds", "0.01", "--max-rounds", "4")
    assert result.returncode == 0, result.stderr
    assert "A CPU's speed in float16 says nothing about a GPU's." in result.stderr


def test_a_bfloat16_graph_is_verified_widened_and_says_so(half: Callable[[str, str], Path]) -> None:
    folder = half("modernbert", "bfloat16")
    report = json.loads((folder / "reports" / "verification" / "ratio-2.json").read_text())
    assert report["ran"] == WIDENED
    result = verify(folder, [2], profile_shapes="none")
    assert (result.failures, result.ran) == ([], WIDENED)
    stored = call("verify", str(folder), "--reference", "stored", "--ratio", "2")
    assert stored.returncode == 0, stored.stderr
    assert f"The graphs ran {WIDENED}" in stored.stderr
    with pytest.raises(UserError, match="is in bfloat16, and ONNX Runtime has no bfloat16 products on a CPU"):
        Bundle.load(folder).session()


@pytest.mark.parametrize(("model", "precision"), [("bert", "float16"), ("modernbert", "bfloat16")])
def test_a_fault_in_half_precision_is_found_and_named(
    half: Callable[[str, str], Path], tmp_path: Path, model: str, precision: str
) -> None:
    """Two layers have each other's plugin tensor in the graph, whose hash is made to fit."""
    folder = tmp_path / "faulty"
    shutil.copytree(half(model, precision), folder)
    graph = ir.load(folder / "ratio-2.onnx")
    first, second = (
        graph.graph.initializers[f"plugin.layers.{layer}.decompress.up.weight"] for layer in (0, 1)
    )
    first.const_value, second.const_value = second.const_value, first.const_value
    ir.save(graph, folder / "ratio-2.onnx")
    sign(folder)
    assert verify(folder, [2], reference="stored", profile_shapes="none").failures
    (bisection,) = verify(folder, [2], profile_shapes="none", reproduction=tmp_path / "fault").bisections
    assert bisection.first is not None
    layer = "encoder.layer.0.intermediate" if model == "bert" else "layers.0.mlp"
    assert bisection.first.module == f"{layer}.plugin.decompress"
    where = tmp_path / "fault" / "ratio-2" / "ratio-2.onnx"
    shown = subprocess.run(
        [sys.executable, "reproduce.py"], cwd=where, capture_output=True, text=True, check=False
    )
    error, limit = (float(number) for number in re.findall(r"(?:error|allowed:) (\S+)", shown.stdout))
    assert error > 5 * limit, shown.stderr


def test_products_in_another_type_are_counted_and_refused(
    half: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graph = half("t5-v1.0", "float16") / "ratio-1.onnx"
    assert precision_share(graph, "float16", [WO], 1, "encoder.block").macs == 1.0
    undeclared = precision_share(graph, "float16", [], 1, "encoder.block")
    assert 0.5 < undeclared.macs < 0.95
    assert precision_share(graph, "bfloat16", [WO], 1, "encoder.block").macs == 0
    # As if it were not declared.
    monkeypatch.setattr(
        "variator_export.graph.macs.precision_share",
        lambda path, precision, _, ratio, stack: precision_share(path, precision, [], ratio, stack),
    )
    source = Bundle.load(graph.parent).manifest.recipe
    with pytest.raises(NumbersDisagreeError, match=r"% of the multiply-accumulates are in float16"):
        build(
            Recipe.model_validate({**source, "targets": ["onnxruntime"], "speed": None}), tmp_path / "other"
        )
    assert not (tmp_path / "other").exists()


def test_what_stays_in_float32_is_what_transformers_keeps() -> None:
    for name, architecture in architectures().items():
        model_class = getattr(transformers, name)
        assert not getattr(model_class, "_keep_in_fp32_modules_strict", None), name
        kept = tuple(model_class._keep_in_fp32_modules or ())
        assert architecture.family.float32_modules == kept, name


def test_float32_modules_keep_their_unrounded_weights(load_model: Callable[[str], Backbone]) -> None:
    backbone = load_model("t5-v1.0")
    before = backbone.state
    for precision, stays in (("float16", True), ("bfloat16", False)):
        after = backbone.in_precision(find_precision(precision)).state
        wo = next(name for name in before if f".{WO}." in name)
        assert (after[wo].dtype == torch.float32) is stays
        assert torch.equal(after[wo], before[wo]) is stays
        others = {tensor.dtype for name, tensor in after.items() if f".{WO}." not in name}
        assert others == {getattr(torch, precision)}


def test_weights_that_do_not_fit_are_refused(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(small_model("bert"), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("intermediate.dense.weight"))
    weights[name][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = {"name": "large", "backbone": {"source": str(folder)}, "precision": "float16", "speed": None}
    with pytest.raises(UserError, match=r"do not fit float16: .*intermediate\.dense\.weight"):
        build(Recipe.model_validate(recipe), tmp_path / "bundle")


def test_a_bundle_has_one_precision(
    half: Callable[[str, str], Path], small_recipe: Recipe, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(half("bert", "float16"), folder)
    with pytest.raises(UserError, match="The bundle is in float16; float32 is asked for"):
        build(small_recipe, folder)
    recipe = small_recipe.model_copy(update={"precision": "bfloat16"})
    assert (default_bundle(small_recipe).name, default_bundle(recipe).name) == ("small", "small-bfloat16")
