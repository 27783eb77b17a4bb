"""int8: graphs that compute their quantisation, near float32, with rows that do not depend on each other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from artefacts import Artefacts
from command_line import call
from conftest import MODELS, plugin_for
from safetensors import safe_open

from variator_export import Bundle, NumbersDisagreeError, UserError, build
from variator_export.building.evaluate import evaluate
from variator_export.building.recipe_build import default_bundle
from variator_export.bundle.reports import build_verification_report
from variator_export.core.precision import INT8
from variator_export.data.examples import Columns, Examples
from variator_export.engines.eager import EagerModel
from variator_export.engines.onnxruntime import kernels
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.graph.macs import precision_share
from variator_export.graph.weights import quantized_input, stored_weight
from variator_export.model.backbone import Backbone
from variator_export.model.methods import method_of
from variator_export.model.plugin_layout import Plugin
from variator_export.model.quantization.layers import is_part_of
from variator_export.recipe.recipe import GraphsRecipe, QuantizationRecipe, Recipe
from variator_export.verification.bundle_verification import verify
from variator_export.verification.cases import Case, make_cases
from variator_export.verification.judging import expected
from variator_export.verification.judging.error_budget import Budget, make_budgets, scaled
from variator_export.verification.judging.judge import GIVEN_ROUNDING
from variator_export.verification.quantized import given_rounding
from variator_export.verification.quantized.given_rounding import check_given_rounding
from variator_export.verification.quantized.losses import quantization_losses
from variator_export.verification.reference import load_reference

Recipes = Callable[..., Recipe]


@pytest.fixture(scope="module")
def int8_recipe(half_recipe: Recipes) -> Recipes:
    """A recipe of a small model with a plugin of ratio 2. The plugin and the backbone are random."""

    def find(model: str, **quantization: object) -> Recipe:
        return half_recipe(model, "int8", quantization=quantization)

    return find


@pytest.fixture(scope="module")
def int8_bundle(artefacts: Artefacts, int8_recipe: Recipes) -> Callable[[str], Path]:
    """A verified int8 bundle by the name of its model. Not to be changed."""

    def find(model: str) -> Path:
        recipe = int8_recipe(model, min_agreement=0.8)
        return artefacts.folder(f"int8/{model}", lambda folder: build(recipe, folder))

    return find


@pytest.fixture(scope="module")
def cases(int8_bundle: Callable[[str], Path]) -> list[Case]:
    """Small cases of the small BERT."""
    bundle = Bundle.load(int8_bundle("bert"))
    entry = bundle.manifest.backbone
    made = make_cases(bundle.text_encoder(), entry.inputs, ratio=2, vocab_size=30522, max_length=64)
    return [case for case in made if case.stored]


@pytest.mark.parametrize("model", MODELS)
def test_every_family_is_quantised_and_verified(int8_bundle: Callable[[str], Path], model: str) -> None:
    folder = int8_bundle(model)
    manifest = Bundle.load(folder).manifest
    with safe_open(folder / "weights.safetensors", framework="np") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    quantised = {name for name, array in weights.items() if array.dtype == np.int8}
    assert quantised
    assert {f"{name}_scale" for name in quantised} <= weights.keys()
    # A product of two neighbours with unsigned activations fits into 16 bits, whatever the CPU.
    linear = [name for name in quantised if "embed" not in name and "shared" not in name]
    assert max(int(np.abs(weights[name].astype(int)).max()) for name in linear) == INT8.largest_weight
    # The output layer of a masked language model shares its embeddings.
    assert len(quantised) - len(linear) == (0 if model == "electra" else 1)
    for variant in manifest.variants:
        graph = ir.load(folder / variant.graph).graph
        assert set(quantized_products(graph)) == set(linear)
        assert variant.precision_proof.macs == 1.0
        assert 0.3 < sum(variant.precision_proof.float32_modules.values()) < 0.99
        report = json.loads((folder / build_verification_report(variant.name)).read_text())
        given = [f for f in report["findings"] if f["check"] == GIVEN_ROUNDING]
        assert {f["graph"] for f in given} == {variant.graph, "any-ratio.onnx"}
        # Far below what quantisation changes: only the rounding of float32.
        assert max(f["relative_frobenius"] for f in given) < 5e-5
        assert min(loss["cosine"] for loss in report["quantization"]) > 0.99


@pytest.mark.parametrize("model", MODELS)
def test_a_row_does_not_depend_on_its_batch(int8_bundle: Callable[[str], Path], model: str) -> None:
    """To the last bit, in the graph of one ratio."""
    folder = int8_bundle(model)
    bundle = Bundle.load(folder)
    varies = bundle.manifest.backbone.padding_states_vary
    for variant in bundle.manifest.variants:
        runner = OnnxRuntimeRunner(folder / variant.graph)
        inputs = load_reference(folder / variant.reference)[0].case.inputs
        whole = runner.run(inputs)
        for row in range(len(inputs["input_ids"])):
            alone = runner.run({name: array[row : row + 1] for name, array in inputs.items()})
            for name, values in alone.items():
                assert np.array_equal(values[0], whole[name][row]), (variant.name, row, varies)


def test_weights_are_stored_once(int8_bundle: Callable[[str], Path]) -> None:
    folder = int8_bundle("bert")
    locations = set()
    for graph in folder.glob("*.onnx"):
        for value in ir.load(graph).graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                locations.add(str(value.const_value.location))
            else:
                assert value.const_value is not None
                assert value.const_value.nbytes < 1024
    assert locations == {"weights.safetensors", "plugins/ratio-2/plugin.safetensors"}
    tables = 30522 * (32 + 4)  # a byte for each number and a scale for each token
    assert (folder / "weights.safetensors").stat().st_size < 1.1 * tables


def test_one_session_changes_its_ratio(int8_bundle: Callable[[str], Path], cases: list[Case]) -> None:
    bundle = Bundle.load(int8_bundle("bert"))
    session = bundle.session()
    for ratio in (1, 2, 1):
        found = session.run(cases[0].inputs, ratio=ratio)["last_hidden_state"]
        own = bundle.session(variant=ratio).run(cases[0].inputs)["last_hidden_state"]
        assert np.linalg.norm(found - own) < 0.02 * np.linalg.norm(own)


def test_graphs_for_an_older_onnxruntime(
    int8_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(opset: int) -> Recipe:
        return int8_recipe("bert").model_copy(update={"graphs": GraphsRecipe(opset=opset)})

    build(of(21), tmp_path / "bundle")  # and verifies it
    with pytest.raises(UserError, match="int8 graphs need opset 21") as raised:
        build(of(20), tmp_path / "other")
    assert "--opset 21" in str(raised.value.hint)
    monkeypatch.setattr(kernels, "installed_version", lambda _: "1.23.2")
    assert Bundle.load(tmp_path / "bundle").session().ratios == (1, 2)
    with pytest.raises(UserError, match=r"int8 graphs of opset 23 need ONNX Runtime 1\.24; 1\.23\.2 is"):
        build(of(23), tmp_path / "other")
    path = tmp_path / "bundle" / "manifest.json"
    path.write_text(path.read_text().replace('"opset": 21', '"opset": 23'))
    with pytest.raises(UserError, match=r"need ONNX Runtime 1\.24"):
        Bundle.load(tmp_path / "bundle").session()


def quantized_products(graph: ir.Graph) -> dict[str, ir.Node]:
    """The products of integers in a graph, by the name of their weight."""
    found = {}
    for node in graph:
        if quantized_input(node) is not None:
            weight = stored_weight(node)
            assert weight is not None
            found[str(weight.name)] = node
    return found


def _scaled_channel(model: ir.Model) -> None:
    """One channel's scale of one layer is doubled."""
    _change_scales(model, lambda scales: np.concatenate([scales[:1] * 2, scales[1:]]))


def _swapped_channels(model: ir.Model) -> None:
    """Two channels have each other's scale."""
    _change_scales(model, lambda scales: np.concatenate([scales[1::-1], scales[2:]]))


def _change_scales(model: ir.Model, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers["encoder.layer.1.attention.self.value.weight_scale"]
    assert value.const_value is not None
    value.const_value = ir.tensor(change(value.const_value.numpy().copy()), name=value.name)


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def _quantizer(model: ir.Model) -> ir.Node:
    """The node that quantises the activations of the first product."""
    return next(node for node in model.graph if node.op_type == "QuantizeLinear")


def _shifted_zero_point(model: ir.Model) -> None:
    """One product subtracts 127 where 128 was added."""
    node = next(iter(_quantizer(model).outputs[0].consumers()))
    node.replace_input_with(2, _constant(model, "another_zero", np.array(127, np.uint8)))


def _moved_activations(model: ir.Model) -> None:
    """One layer's activations are moved by 0.6 of a step before they are rounded."""
    node = _quantizer(model)
    step = ir.node("Mul", [node.inputs[1], _constant(model, "part", np.array(0.6, np.float32))])
    moved = ir.node("Add", [node.inputs[0], step.outputs[0]])
    step.outputs[0].name, moved.outputs[0].name = "step", "moved"
    model.graph.insert_before(node, [step, moved])
    node.replace_input_with(0, moved.outputs[0])


def _scale_of_the_tensor(model: ir.Model) -> None:
    """One layer has one scale for the whole batch, as `quantize_dynamic` has it."""
    node = next(node for node in model.graph if node.op_type == "ReduceMax")
    node.replace_input_with(1, _constant(model, "all_axes", np.array([0, 1, 2])))


@pytest.mark.parametrize(
    "fault",
    [_scaled_channel, _swapped_channels, _shifted_zero_point, _moved_activations, _scale_of_the_tensor],
)
@pytest.mark.parametrize("graph", ["ratio-2.onnx", "any-ratio.onnx"])
def test_a_fault_in_the_quantisation_is_found(
    int8_bundle: Callable[[str], Path],
    load_model: Callable[[str], Backbone],
    cases: list[Case],
    tmp_path: Path,
    graph: str,
    fault: Callable[[ir.Model], None],
) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(int8_bundle("bert"), folder)
    bundle = Bundle.load(folder)
    backbone = load_model("bert").in_precision(INT8)
    eager = [
        EagerModel.of_variant(b, bundle, bundle.variant(2))
        for b in (backbone.to_dtype(torch.float64), backbone)
    ]
    extra = method_of(bundle.variant(2)).inputs_of(bundle, bundle.variant(2), bundle.manifest.any_ratio_graph)
    graphs = {graph: extra if graph == "any-ratio.onnx" else {}}
    assert all(f.passed for f in check_given_rounding(graphs, folder, "int8", *eager, cases))
    model = ir.load(folder / graph)
    fault(model)
    ir.save(model, folder / graph)
    failed = [f for f in check_given_rounding(graphs, folder, "int8", *eager, cases) if not f.passed]
    assert failed
    assert all(map(str, failed))  # each can be printed


def test_near_the_limit_more_roundings_are_measured(
    int8_bundle: Callable[[str], Path],
    load_model: Callable[[str], Backbone],
    cases: list[Case],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eager PyTorch may be exact by chance: here, eight times as exact as it is."""
    folder = int8_bundle("bert")
    bundle = Bundle.load(folder)
    backbone = load_model("bert").in_precision(INT8)
    exact, rounded = (
        EagerModel.of_variant(b, bundle, bundle.variant(2))
        for b in (backbone.to_dtype(torch.float64), backbone)
    )

    def lucky(eager: Any, precision: str) -> list[dict[str, Budget]]:
        return [scaled(of_case, 1 / 8) for of_case in make_budgets(eager, precision)]

    monkeypatch.setattr(given_rounding, "make_budgets", lucky)

    def passed() -> bool:
        found = check_given_rounding({"ratio-2.onnx": {}}, folder, "int8", exact, rounded, cases)
        return all(f.passed for f in found)

    assert passed()
    monkeypatch.setattr(expected, "_NEAR", 0)
    assert not passed(), "without them the limit is not met"


def test_verify_checks_the_rounding_and_the_loss(int8_bundle: Callable[[str], Path]) -> None:
    folder = int8_bundle("bert")
    result = verify(folder, [2], profile_shapes="none")
    assert result.passed
    assert {f.question.graph for f in result.findings["ratio-2"] if f.question.check == GIVEN_ROUNDING} == {
        "ratio-2.onnx", "any-ratio.onnx"
    }  # fmt: skip
    (loss,) = result.losses["ratio-2"]
    assert (loss.output, loss.passed, loss.limit) == ("last_hidden_state", True, 0.97)
    assert 0.99 < loss.least_cosine < loss.cosine < 1
    assert "a quarter of what quantisation changes" in result.unit
    # Neither torch nor the backbone: only what the build stored.
    stored = verify(folder, [2], reference="stored")
    assert (stored.passed, stored.losses) == (True, {})
    with pytest.raises(UserError, match="Bisection compares modules, and those of int8"):
        verify(folder, [2], reproduction=Path("nowhere"))


def test_a_limit_that_is_not_met_names_the_module_that_loses_most(
    int8_recipe: Recipes, tmp_path: Path
) -> None:
    recipe = int8_recipe("bert", min_cosine=0.99999)
    with pytest.raises(NumbersDisagreeError) as raised:
        build(recipe, tmp_path / "bundle")
    assert "the mean cosine is 0.99" in raised.value.message
    assert "at least 0.99999 is required" in raised.value.message
    assert raised.value.exit_code == 3
    assert not (tmp_path / "bundle").exists()
    hint = str(raised.value.hint)
    assert "loses most: with it in float32 the error is" in hint
    module = hint.partition("float32_modules: [")[2].partition("]")[0]
    assert any(
        is_part_of(f"encoder.layer.{layer}.{kind}", module)
        for layer in (0, 1)
        for kind in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    )


def test_modules_stay_in_float32(int8_recipe: Recipes, tmp_path: Path) -> None:
    recipe = int8_recipe("bert", float32_modules=["attention.self.value", "layer.1.output"])
    folder = build(recipe, tmp_path / "bundle").bundle
    names = quantized_products(ir.load(folder / "ratio-1.onnx").graph)
    assert "encoder.layer.0.output.dense.weight" in names
    assert not {n for n in names if n and ("value" in n or "layer.1.output" in n)}
    proof = Bundle.load(folder).manifest.variants[0].precision_proof
    assert proof.macs == 1.0
    assert "encoder.layer.0.attention.self.value" in proof.float32_modules
    # Not declared, and so counted against the precision.
    share = precision_share(folder / "ratio-1.onnx", "int8", [], 1, "encoder.layer")
    assert 0.5 < share.macs < 0.95
    assert verify(folder, [1], profile_shapes="none").passed


def test_a_module_that_is_not_there(int8_recipe: Recipes, tmp_path: Path) -> None:
    recipe = int8_recipe("bert", float32_modules=["attention.self.valeu"])
    with pytest.raises(UserError, match=r"no linear layer in a module 'attention\.self\.valeu'") as raised:
        build(recipe, tmp_path / "bundle")
    assert "attention.self.value, " in str(raised.value.hint)
    every = int8_recipe("bert", float32_modules=["encoder"])
    with pytest.raises(UserError, match="no linear layer left to quantise"):
        build(every, tmp_path / "bundle")


def test_targets_that_have_no_int8(int8_bundle: Callable[[str], Path], int8_recipe: Recipes) -> None:
    recipe = int8_recipe("bert").model_copy(update={"targets": ("onnxruntime", "tensorrt-rtx")})
    with pytest.raises(UserError, match="tensorrt-rtx cannot build engines in int8") as raised:
        build(recipe)
    assert "--target onnxruntime" in str(raised.value.hint)
    folder = int8_bundle("bert")
    refused = call("compile", str(folder), "--target", "tensorrt-rtx")
    assert refused.returncode == 1
    assert "tensorrt-rtx cannot build engines in int8" in refused.stderr
    with pytest.raises(UserError, match="is in int8: ONNX Runtime's providers for GPUs would"):
        Bundle.load(folder).session("onnxruntime-cuda")
    assert default_bundle(recipe).name == "small-int8"


def test_a_loss_is_measured_for_each_kind_of_output() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    case = Case("text", {"input_ids": mask, "attention_mask": mask})
    rng = np.random.default_rng(0)
    outputs = {
        "last_hidden_state": rng.normal(size=(2, 3, 8)),
        "sentence_embedding": rng.normal(size=(2, 8)),
        "logits": np.array([[0.0, 1.0], [1.0, 0.0]]),
        "start_logits": rng.normal(size=(2, 3)),
    }
    tokens, limits = ("last_hidden_state", "start_logits"), QuantizationRecipe()
    same = quantization_losses("v", outputs, outputs, case, tokens, limits)
    assert [(loss.count, round(loss.measured, 9), loss.passed) for loss in same] == [
        (3, 1.0, True), (2, 1.0, True), (2, 1.0, True), (2, 1.0, True)
    ]  # fmt: skip
    # What lies behind the mask does not count.
    behind = {name: np.where(mask[..., None] if v.ndim == 3 else True, v, 99) for name, v in outputs.items()}
    assert quantization_losses("v", behind, outputs, case, tokens, limits)[0].cosine == pytest.approx(1)
    turned = {
        **outputs,
        "logits": outputs["logits"][::-1],
        "sentence_embedding": -outputs["sentence_embedding"],
    }
    found = {loss.output: loss for loss in quantization_losses("v", turned, outputs, case, tokens, limits)}
    assert (found["logits"].agreement, found["logits"].passed) == (0.0, False)
    assert (round(found["sentence_embedding"].cosine, 9), found["sentence_embedding"].passed) == (-1.0, False)
    nan = {**outputs, "sentence_embedding": outputs["sentence_embedding"] * np.nan}
    assert not quantization_losses("v", nan, outputs, case, tokens, limits)[1].passed


def test_evaluate_counts_what_int8_costs(int8_bundle: Callable[[str], Path]) -> None:
    """Losses are against the uncompressed float32 model, where eager PyTorch ran."""
    texts = tuple(f"The ferry number {number} leaves at seven." for number in range(8))
    examples = Examples("texts", "0" * 64, Columns(target=None), texts, None, None, texts)
    both = evaluate(int8_bundle("bert"), examples)
    rows = {(row.runtime, row.ratio): row for row in both.rows}
    assert rows["eager", 1].relative_loss in (0, None)
    assert rows["onnxruntime", 1].metrics != rows["eager", 1].metrics
    alone = evaluate(int8_bundle("bert"), examples, runtimes=["onnxruntime"])
    assert any("The losses do not count what int8 itself costs" in warning for warning in alone.warnings)


def test_plugin_stays_in_float32(load_model: Callable[[str], Backbone]) -> None:
    """Its tensors are inputs of the any-ratio graph, and its products are a small share."""
    plugin = plugin_for(load_model("bert"), 2)
    assert isinstance(plugin, Plugin)
    model = EagerModel(load_model("bert").in_precision(INT8), plugin)
    kinds = {name: type(m).__name__ for name, m in model.transformer.named_modules() if "plugin" in name}
    assert "Int8Linear" not in kinds.values()
