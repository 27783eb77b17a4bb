"""Static quantisation: calibrated scales, graphs for TensorRT and OpenVINO, and the proof of their types."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from artefacts import Artefacts
from command_line import call
from conftest import MODELS, Notes
from safetensors.torch import load_file, save_file

from variator_export import Bundle, UserError, build
from variator_export.core.precision import FP8, INT8, INT8_FLOAT16, INT8_STATIC, Precision
from variator_export.engines.eager import EagerModel
from variator_export.engines.layers import precision_in_engine
from variator_export.engines.tensorrt.schedule import scheduled_products
from variator_export.graph.weights import quantized_input, stored_weight
from variator_export.model.backbone import Backbone
from variator_export.model.methods import method_of
from variator_export.model.quantization.calibration import Calibration, calibrate, load_calibration
from variator_export.model.quantization.spacing import beyond_half_a_step
from variator_export.model.quantization.static import LayerScales, StaticLinear
from variator_export.recipe.recipe import Recipe
from variator_export.recipe.recipe_file import load_recipe
from variator_export.verification.bundle_verification import verify
from variator_export.verification.cases import make_cases
from variator_export.verification.quantized.given_rounding import check_given_rounding

Recipes = Callable[..., Recipe]
STATIC = (INT8_STATIC, INT8_FLOAT16, FP8)
# Each family in one precision.
FAMILIES = [
    (model, precision.name) for model, precision in zip(MODELS, itertools.cycle(STATIC), strict=False)
]
_WORDS = ("the", "ferry", "island", "leaves", "seven", "returns", "dark", "letter", "blue", "ribbon", "with")


def write_texts(path: Path, number: int) -> Path:
    """A table of texts of random words."""
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(_WORDS, size=rng.integers(3, 20))) for _ in range(number)]
    path.write_text("\n".join(["sentence", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def static_recipe(artefacts: Artefacts, half_recipe: Recipes) -> Recipes:
    """A recipe of a small model with a plugin of ratio 2 and 48 calibration texts."""

    def find(model: str, precision: str, **quantization: object) -> Recipe:
        data = artefacts.folder("calibration", lambda folder: write_texts(folder / "texts.tsv", 48))
        texts = {"data": str(data / "texts.tsv"), "text_column": "sentence"}
        quantization = {"min_agreement": 0.8, "calibration": texts, **quantization}
        return half_recipe(model, precision, quantization=quantization)

    return find


@pytest.fixture(scope="module")
def static_bundle(artefacts: Artefacts, static_recipe: Recipes) -> Callable[[str, str], Path]:
    """A verified bundle by model and precision. Not to be changed."""

    def find(model: str, precision: str) -> Path:
        recipe = static_recipe(model, precision)
        return artefacts.folder(f"static/{precision}/{model}", lambda folder: build(recipe, folder))

    return find


@pytest.mark.parametrize(("model", "name"), FAMILIES)
def test_every_family_is_quantised_and_verified(
    static_bundle: Callable[[str, str], Path], model: str, name: str
) -> None:
    folder = static_bundle(model, name)
    precision = next(p for p in STATIC if p.name == name)
    dtype = torch.float8_e4m3fn if precision is FP8 else torch.int8
    weights = load_file(folder / "weights.safetensors")
    calibration = load_calibration(folder / "calibration.safetensors")
    linear = {f"{layer}.weight" for layer in calibration.layers}
    stored = {w for w, tensor in weights.items() if tensor.dtype == dtype and "embed" not in w}
    stored -= {"shared.weight"}
    assert stored
    # The names of a head's model have a prefix; T5's second product stays in float32.
    assert all(any(w.endswith(layer) for layer in linear) for w in stored)
    assert max(float(weights[w].float().abs().max()) for w in stored) == precision.largest_weight
    kinds = {tensor.dtype for w, tensor in weights.items() if w.endswith("_scale") and "embed" not in w}
    kinds -= {torch.float32} if "t5" in model else set()
    assert kinds <= {getattr(torch, precision.dtype)}
    for variant in Bundle.load(folder).manifest.variants:
        nodes = [node for node in ir.load(folder / variant.graph).graph if quantized_input(node) is not None]
        assert {str(weight.name) for node in nodes if (weight := stored_weight(node))} == stored
        assert variant.precision_proof.macs == 1.0
        for node in nodes:  # TensorRT's form: constant symmetric scales, and the weight's directly behind it
            quantizer = quantized_input(node).producer()  # type: ignore[union-attr]
            assert quantizer is not None
            scale = quantizer.inputs[1]
            assert scale is not None
            assert scale.is_initializer()
            assert node.inputs[1].producer().op_type == "Transpose"  # type: ignore[union-attr]
        report = json.loads((folder / "reports" / "verification" / f"{variant.name}.json").read_text())
        assert all(finding["passed"] for finding in report["findings"])


def test_layers_that_read_one_input_share_its_quantisation(
    static_bundle: Callable[[str, str], Path],
) -> None:
    graph = ir.load(static_bundle("bert", "int8-static") / "ratio-1.onnx").graph
    products = [node for node in graph if quantized_input(node) is not None]
    inputs = {id(quantized_input(node)) for node in products}
    # Query, key and value; the output of attention; the two products of a feed-forward network.
    assert (len(products), len(inputs)) == (2 * 6, 2 * 4)


def test_smoothing_follows_the_outliers() -> None:
    """One channel is 100 times as large as the others, in activations that two layers read."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.first, model.second = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)  # type: ignore[assignment]
    table = torch.randn(64, 16)
    table[:, 3] *= 100
    model.forward = lambda rows: (model.first(x := table[rows[0]]), model.second(x))  # type: ignore[assignment]
    texts = [{"rows": np.arange(start, start + 8)[None]} for start in range(0, 64, 8)]
    layers = {"first": model.first, "second": model.second}
    found = calibrate(model, layers, texts, INT8_FLOAT16)  # type: ignore[arg-type]
    scales = found.in_type(torch.float32)
    assert scales["first"] is scales["second"]
    smoothing = scales["first"].smoothing
    assert smoothing is not None
    assert smoothing.argmin() == 3
    largest = float((table * smoothing).abs().max())
    assert float(scales["first"].input_scale) == pytest.approx(1.25 * largest / 127, rel=1e-4)

    def error(chosen: LayerScales) -> float:
        layer = StaticLinear(model.first.weight, model.first.bias, chosen, INT8_STATIC)  # type: ignore
        with torch.inference_mode():
            return float((layer(table) - model.first(table)).norm())  # type: ignore[operator]

    plain = LayerScales(table.abs().max() * 1.25 / 127, None)
    assert error(scales["first"]) < 0.4 * error(plain)
    # A channel that is nearly always zero gets a factor that float16 holds.
    table[:, 5] *= 1e-9
    small = calibrate(model, layers, texts, INT8_FLOAT16).in_type(torch.float16)  # type: ignore[arg-type]
    assert all(s.smoothing is None or bool(torch.isfinite(s.smoothing).all()) for s in small.values())
    # fp8 has the same relative precision for small values, and needs no smoothing.
    floats = calibrate(model, layers, texts, FP8)  # type: ignore[arg-type]
    assert floats.layers["first"].smoothing is None


def test_a_layer_saturates_and_survives_zeros() -> None:
    linear = torch.nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0]])
    for precision, largest in ((INT8_STATIC, 127.0), (INT8_FLOAT16, 127.0), (FP8, 448.0)):
        dtype = getattr(torch, precision.dtype)
        scales = LayerScales(torch.tensor(1.0, dtype=dtype), None)
        layer = StaticLinear(linear.weight, None, scales, precision)
        x = torch.tensor([[1e4, 0, 0, 0], [0, 0, 0, 0]], dtype=dtype)
        with torch.inference_mode():
            y = layer(x).float()
        assert y[0, 0] == pytest.approx(largest, rel=0.02)
        assert y[0, 1] == 0
        assert (y[1] == 0).all()


def test_a_value_that_is_not_the_nearest() -> None:
    exact = np.random.default_rng(0).normal(size=20_000) * 10.0 ** np.linspace(-4, 2.6, 20_000)
    rounded = torch.from_numpy(exact).clamp(-448, 448).to(torch.float8_e4m3fn)
    beyond = beyond_half_a_step(exact, rounded.double().numpy(), FP8)
    assert beyond.max() <= 0
    # The next values on both sides are not the nearest ones.
    patterns = rounded.view(torch.uint8)
    inner = (patterns % 128 > 0) & (patterns % 128 < 126)
    for step in (-1, 1):
        other = (patterns + step).view(torch.float8_e4m3fn).double().numpy()
        assert beyond_half_a_step(exact, other, FP8)[inner.numpy()].min() >= 0
    saturated = beyond_half_a_step(np.array([1e6, -300]), np.array([127, -128]), INT8_STATIC)
    assert saturated.tolist() == [-0.5, -0.5]
    assert beyond_half_a_step(np.array([200.0, 3.7]), np.array([127, 3]), INT8) == pytest.approx([72.5, 0.2])


def _scaled_channel(tensors: dict[str, torch.Tensor]) -> None:
    """One channel's scale is doubled; in half precision multiplied by more, to exceed its rounding."""
    scales = tensors["encoder.layer.1.attention.self.value.weight_scale"]
    scales[0] *= 2 if scales.dtype == torch.float32 else 16


def _swapped_channels(tensors: dict[str, torch.Tensor]) -> None:
    """Two channels have each other's scale."""
    scales = tensors["encoder.layer.0.intermediate.dense.weight_scale"]
    scales[[0, 1]] = scales[[1, 0]]


def _scaled_input(tensors: dict[str, torch.Tensor]) -> None:
    """One layer's activations are divided by a scale that is a tenth larger."""
    tensors["encoder.layer.1.output.dense.input_scale"] *= 1.1


def _changed_bias(tensors: dict[str, torch.Tensor]) -> None:
    """One bias of a quantised layer is off."""
    bias = tensors["encoder.layer.0.output.dense.bias"]
    bias[0] += 0.02 if bias.dtype == torch.float32 else 0.5


@pytest.mark.parametrize(
    ("precision", "fault"),
    [
        (INT8_STATIC, _scaled_channel),
        (INT8_STATIC, _swapped_channels),
        (INT8_STATIC, _scaled_input),
        (INT8_STATIC, _changed_bias),
        (FP8, _scaled_channel),
        (FP8, _scaled_input),
        (FP8, _changed_bias),
    ],
    ids=lambda found: getattr(found, "name", None) or found.__name__,
)
def test_a_fault_in_the_quantisation_is_found(
    static_bundle: Callable[[str, str], Path],
    load_model: Callable[[str], Backbone],
    tmp_path: Path,
    precision: Precision,
    fault: Callable[[dict[str, torch.Tensor]], None],
) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(static_bundle("bert", precision.name), folder)
    bundle = Bundle.load(folder)
    variant = bundle.variant(2)
    calibration = load_calibration(folder / "calibration.safetensors")
    backbone = load_model("bert").in_precision(precision, (), calibration)
    eager = [EagerModel.of_variant(b, bundle, variant) for b in (backbone.to_dtype(torch.float64), backbone)]
    entry = bundle.manifest.backbone
    made = make_cases(bundle.text_encoder(), entry.inputs, ratio=2, vocab_size=30522, max_length=64)
    cases = [case for case in made if case.stored]
    graphs = {
        variant.graph: {},
        "any-ratio.onnx": method_of(variant).inputs_of(bundle, variant, "any-ratio.onnx"),
    }
    assert all(f.passed for f in check_given_rounding(graphs, folder, precision.name, *eager, cases))
    tensors = load_file(folder / "weights.safetensors")
    fault(tensors)
    before = (folder / "weights.safetensors").read_bytes()
    save_file(dict(sorted(tensors.items())), folder / "weights.safetensors")
    after = (folder / "weights.safetensors").read_bytes()
    assert len(before) == len(after), "the graphs refer to places in the file"
    findings = check_given_rounding(graphs, folder, precision.name, *eager, cases)
    assert {f.question.graph for f in findings if not f.passed} == set(graphs)


def test_openvino_runs_and_is_verified(static_bundle: Callable[[str, str], Path]) -> None:
    folder = static_bundle("bert", "int8-static")
    result = verify(folder, [2], target="openvino", profile_shapes="none")
    assert result.passed
    assert "openvino" in result.ran
    with pytest.raises(UserError, match="is in fp8; OpenVINO runs bundles in float32, bfloat16"):
        Bundle.load(static_bundle("bert", "fp8")).session("openvino")


def test_what_the_numbers_are_multiples_of(static_bundle: Callable[[str, str], Path]) -> None:
    """In half precision eager PyTorch's own error is the yardstick; it includes what its rounding flips."""
    half = verify(static_bundle("t5-v1.0", "fp8"), [2], profile_shapes="none")
    assert half.passed
    assert half.unit == "Numbers are multiples of eager PyTorch's own rounding error."
    assert half.losses["ratio-2"][0].cosine > 0.98


def test_a_calibration_is_needed_and_must_be_enough(static_recipe: Recipes, tmp_path: Path) -> None:
    recipe = static_recipe("bert", "fp8", calibration=None)
    with pytest.raises(UserError, match="fp8 has constant scales of activations") as raised:
        build(recipe, tmp_path / "bundle")
    assert "--calibration FILE --calibration-column NAME" in str(raised.value.hint)
    few = {"data": str(write_texts(tmp_path / "few.tsv", 31)), "text_column": "sentence"}
    with pytest.raises(UserError, match=r"few\.tsv has 31 texts; a calibration needs 32 or more"):
        build(static_recipe("bert", "fp8", calibration=few), tmp_path / "bundle")
    with pytest.raises(UserError, match=r"few\.tsv has no column 'text'"):
        build(static_recipe("bert", "fp8", calibration={"data": few["data"]}), tmp_path / "bundle")
    with pytest.raises(UserError, match=r"There is no data file .*gone\.tsv"):
        build(static_recipe("bert", "fp8", calibration={"data": str(tmp_path / "gone.tsv")}), tmp_path / "b")
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_keeps_its_calibration(static_recipe: Recipes, tmp_path: Path) -> None:
    """Also when the texts are gone; other texts calibrate again."""
    texts = {"data": str(write_texts(tmp_path / "texts.tsv", 40)), "text_column": "sentence"}
    recipe = static_recipe("bert", "int8-float16", calibration=texts)
    folder = tmp_path / "bundle"
    build(recipe, folder)
    before = (folder / "calibration.safetensors").read_bytes()
    Path(texts["data"]).unlink()
    for again in (recipe, static_recipe("bert", "int8-float16", calibration=None)):
        assert not build(again, folder).published
    # Another file of the same name does not count, where the recipe names none.
    write_texts(Path(texts["data"]), 50)
    assert not build(static_recipe("bert", "int8-float16", calibration=None), folder).published
    settings = json.loads((folder / "manifest.json").read_text())["recipe"]["quantization"]["calibration"]
    assert settings["texts"] == 512
    result = build(static_recipe("bert", "int8-float16"), folder)
    assert {"calibrate", "trace"} <= {step.name for step in result.steps if step.action == "made"}
    assert (folder / "calibration.safetensors").read_bytes() != before
    # The file is part of the bundle.
    (folder / "calibration.safetensors").write_bytes(before)
    with pytest.raises(UserError, match=r"calibration\.safetensors"):
        verify(folder, [1], profile_shapes="none")


def test_a_calibration_file_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    path.write_bytes(b"\x08")
    with pytest.raises(UserError, match="cannot be read"):
        load_calibration(path)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        save_file({"a.input_scale": torch.tensor(value)}, path)
        with pytest.raises(UserError, match="scales that are not positive"):
            load_calibration(path)
    scales = LayerScales(torch.tensor(0.5), torch.ones(3))
    save_file(Calibration({"a": scales, "b": scales}).tensors(), path)
    assert load_calibration(path).in_type(torch.float16)["b"].smoothing is not None


def test_texts_of_another_kind_are_noted(static_recipe: Recipes, tmp_path: Path) -> None:
    same = tmp_path / "same.tsv"
    same.write_text("sentence\n" + "yes\n" * 32)
    texts = {"data": str(same), "text_column": "sentence"}
    recipe = static_recipe("bert", "int8-float16", calibration=texts, min_cosine=-1)
    progress = Notes()
    build(recipe, tmp_path / "bundle", progress=progress)
    (note,) = [note for note in progress.notes if note.startswith("calibration: ")]
    assert "of the tokens of verify.texts are beyond the range of the calibration texts, in encoder" in note


def test_flags(tmp_path: Path) -> None:
    shown = call(
        "build", "minilm", "--precision", "fp8", "--calibration", "train.tsv", "--calibration-column", "s",
        "--show-recipe",
    )  # fmt: skip
    assert shown.returncode == 0
    assert "data: train.tsv" in shown.stdout
    assert "text_column: s" in shown.stdout
    refused = call("build", "minilm", "--calibration-column", "s")
    assert refused.returncode == 2
    assert "--calibration-column needs --calibration" in refused.stderr
    path = tmp_path / "recipe.yaml"
    path.write_text("name: mine\nextends: minilm\nquantization: {calibration: {data: train.tsv}}\n")
    found = load_recipe(path).quantization.calibration
    assert found is not None
    assert found.data == str(tmp_path / "train.tsv")


@pytest.mark.parametrize("precision", ["int8-float16", "fp8"])
def test_a_plan_proves_its_types_without_a_gpu(
    static_bundle: Callable[[str, str], Path], tmp_path: Path, precision: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(static_bundle("bert", precision), folder)
    if precision == "fp8":
        for_cpus = call("compile", str(static_bundle("bert", "int8-static")), "--target", "tensorrt-rtx")
        assert "int8-static is made for CPUs" in for_cpus.stderr
        refused = call("compile", str(folder), "--target", "tensorrt-rtx")
        assert refused.returncode == 1
        assert "fp8 needs sm89 or later; the engine would be for sm80, sm86 too" in refused.stderr
        assert "--compute-capability sm89+sm120+sm121" in refused.stderr
    made = call("compile", str(folder), "--target", "tensorrt-rtx", "--compute-capability", "sm89")
    assert made.returncode == 0, made.stderr
    bundle = Bundle.load(folder)
    for entry in bundle.manifest.engines:
        sidecar = json.loads((folder / entry.sidecar).read_text())
        assert sidecar["plan_proof"] == {"counted_on": "plan", "asked": 1.0, "other": 0.0, "unknown": 0.0}
    assert len(bundle.manifest.engines) == 2


def test_a_schedule_is_read_and_another_form_proves_nothing() -> None:
    plan = b"""\x00\x01header {
  tensor={ alignment=128 dims={ "n" 384 } name="a" strides={ 384 1 } type=half }
  sub_tensor={ base="a" dims={ 8 } name="q" stride_order={ 1 0 } type=int8 }
  tensor={ dims={ 384 384 } name="w" region=consts type=int8 }
  tensor={ dims={ 1 } name="x/MatMul_1_alpha" type=float }
  fully_connected={ name="x/MatMul_1" output={"y" } input={"q" "w" "x/MatMul_1_alpha" } layers="[ONNX Layer: x/MatMul_1]" }
  function={ name=__myl_AddMul input_args={ "a" } layers="[ONNX Layer: x/MatMul_1][ONNX Layer: x/Add_1]" }
  function={ name=_gemm_mha_v2 input_args={ "a" "a" } layers="[ONNX Layer: s/Attention_1]" }
}"""  # noqa: E501
    products = scheduled_products(plan)
    kinds = [[tensor["Format/Datatype"] for tensor in layer["Inputs"]] for layer in products]
    assert kinds == [["int8", "int8"], ["half", "half"]]
    found = precision_in_engine(products, {"x/MatMul_1": 3, "s/Attention_1": 1}, "int8-float16")
    assert found is not None
    assert (found.asked, found.other) == (0.75, 0.25)
    # A quantised weight alone is not a quantised product.
    weight_only = plan.replace(b'input={"q" "w"', b'input={"a" "w"')
    found = precision_in_engine(scheduled_products(weight_only), {"x/MatMul_1": 3}, "int8-float16")
    assert found is not None
    assert (found.asked, found.other, found.unknown) == (0, 0, 1)
    # What a plan for several GPUs declares with two types is not known.
    twice = plan.replace(b"  fully", b'  tensor={ dims={ 1 } name="w" type=half }\n  fully')
    assert [tensor["Format/Datatype"] for tensor in scheduled_products(twice)[0]["Inputs"]] == ["int8"]
    assert scheduled_products(b"another plan" * 100) == []
    assert scheduled_products(plan[: plan.index(b"fully")]) == []
