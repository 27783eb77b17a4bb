"""Engines: real ones, built by TensorRT for RTX on a machine without a GPU. None is run here."""

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from variator_export import Bundle, UserError, build
from variator_export.core.environment import install_command
from variator_export.core.hashing import sha256_file
from variator_export.engines.request import EngineRequest, Profile
from variator_export.engines.tensorrt import api
from variator_export.engines.tensorrt.building.builder_process import build_engine
from variator_export.recipe.recipe import Initialise, Recipe

SHAPES = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ((1, 1), (2, 16), (4, 64)))


def _request(graph: str, shapes: Any = SHAPES, **options: Any) -> EngineRequest:
    profiles = (Profile(name="default", shapes=shapes),)
    return EngineRequest(target="tensorrt-rtx", graph=graph, what="ratio-2", profiles=profiles, **options)


def test_every_ratio_of_minilm_has_an_engine_and_a_sidecar(minilm_bundle: Path) -> None:
    bundle = Bundle.load(minilm_bundle)
    for ratio in (1, 2, 4, 8):
        (entry,) = bundle.engines("tensorrt-rtx", f"ratio-{ratio}")
        sidecar = json.loads(bundle.file(entry.sidecar).read_text())
        engine = bundle.file(entry.engine)
        assert bundle.engine_status(entry) == "built, not verified on a device"
        assert (sidecar["variant"], sidecar["platform"]) == (f"ratio-{ratio}", "portable")
        assert sidecar["engine"]["sha256"] == sha256_file(engine)
        assert sidecar["made_from"]["graph"] == bundle.manifest.files[f"ratio-{ratio}.onnx"].sha256
        assert sidecar["made_from"]["weights"] == bundle.manifest.files["weights.safetensors"].sha256
        assert sidecar["profiles"][0]["shapes"]["input_ids"] == [[1, 1], [8, 128], [32, 512]]
        assert sidecar["engine"]["plan_version"] == sidecar["version"] == entry.version
        assert (sidecar["options"]["tf32"], sidecar["cuda"]) == (False, "13")
        assert engine.stat().st_size > 80e6, "the weights are in it"


def test_attention_without_a_fused_kernel_is_decomposed_and_the_sidecar_says_so(minilm_bundle: Path) -> None:
    """TensorRT for RTX has fused kernels for half precision only (tests/test_precision.py)."""
    bundle = Bundle.load(minilm_bundle)
    assert {bundle.sidecar(entry)["attention"] for entry in bundle.manifest.engines} == {"decomposed"}


def test_a_builder_that_crashes_does_not_take_the_build_with_it(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\necho out of its mind >&2\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    with pytest.raises(UserError, match="was ended by SIGSEGV while it built ratio-2") as raised:
        build_engine(_request("ratio-2.onnx"), small_bundle)
    assert "out of its mind" in raised.value.message


def test_an_engine_is_built_for_one_more_target_without_anything_else(
    small_recipe: Recipe, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe.model_copy(update={"targets": ("tensorrt-rtx",)})
    result = build(recipe, bundle_copy)
    made = [step.name for step in result.steps if step.action == "made"]
    (entry,) = Bundle.load(bundle_copy).engines("tensorrt-rtx", "ratio-2")
    assert made == [f"engine/tensorrt-rtx/portable-{entry.version}/ratio-{k}" for k in (1, 2, 3, 4)]
    sidecar = json.loads((bundle_copy / entry.sidecar).read_text())
    assert sidecar["profiles"][0]["shapes"]["input_ids"] == [[1, 1], [8, 64], [32, 64]], (
        "no longer than the model's limit"
    )
    assert not build(small_recipe, bundle_copy).published, "engines that are there stay"
    other = small_recipe.model_copy(
        update={"verify": small_recipe.verify.model_copy(update={"seed": 4}), "ratios": (2,)}
    )
    monkeypatch.setattr(api, "installed_version", lambda _: None)
    result = build(other, bundle_copy)
    assert result.published, "what is kept needs no TensorRT"
    assert len(Bundle.load(bundle_copy).manifest.engines) == 4
    # A graph that is another takes its engine along, and nobody else's.
    plugin = small_recipe.plugins[0].model_copy(update={"initialise": Initialise(seed=9, bottleneck_size=5)})
    dropped = build(other.model_copy(update={"plugins": (plugin,)}), bundle_copy)
    assert [step.name for step in dropped.steps if step.action == "dropped"] == [made[1]]
    assert {e.variant for e in Bundle.load(bundle_copy).manifest.engines} == {"ratio-1", "ratio-3", "ratio-4"}
    assert len(list(bundle_copy.rglob("*.engine"))) == 3


def test_the_builders_own_words_are_in_the_error(small_bundle: Path, tmp_path: Path) -> None:
    for name in ("weights.safetensors", "plugins"):
        (tmp_path / name).symlink_to(small_bundle / name)
    model = onnx.load(small_bundle / "ratio-2.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type, node.domain = "Unheard", "nowhere"
    model.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(UserError, match="tensorrt-rtx cannot parse the graph for ratio-2") as raised:
        build_engine(_request("odd.onnx"), tmp_path)
    assert f"at the node {node.name} (Unheard)" in raised.value.message
    assert node.name.startswith("encoder.layer.0.intermediate"), "which names the PyTorch module"
    assert "0: default (1x1, 2x16, 4x64)" in raised.value.message


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (
            {"input_ids": SHAPES["input_ids"]},
            "whose shape varies are attention_mask, input_ids, token_type_ids",
        ),
        ({**SHAPES, "attention_mask": ((4, 1), (2, 16), (4, 64))}, "must be min <= opt <= max"),
    ],
)
def test_profiles_that_the_builder_would_take_without_a_word(
    small_bundle: Path, profile: dict[str, tuple[tuple[int, int], ...]], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        build_engine(_request("ratio-2.onnx", profile), small_bundle)


def test_a_builder_that_fails_says_why(tmp_path: Path) -> None:
    """A graph that parses and cannot work at the shapes of its profile."""
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input_ids"], ["x"], to=kinds.FLOAT),
            helper.make_node("Add", ["x", "seven"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("input_ids", kinds.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("y", kinds.FLOAT, None)],
        [helper.make_tensor("seven", kinds.FLOAT, [7], [1.0] * 7)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "seven.onnx")
    one = {"input_ids": SHAPES["input_ids"]}
    with pytest.raises(UserError, match="tensorrt-rtx built no engine for ratio-2") as raised:
        build_engine(_request("seven.onnx", one), tmp_path)
    assert "Broadcast has incompatible dimensions: 7 != 16" in raised.value.message
    beyond = {"input_ids": ((1, 1), (2, 16), (4, 2**31))}
    with pytest.raises(
        UserError, match=r"The builder refuses the shapes .* of input_ids in the profile default"
    ):
        build_engine(_request("seven.onnx", beyond), tmp_path)


def test_a_tensorrt_that_is_not_installed_is_named_before_anything_slow(
    small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "installed_version", lambda _: None)
    recipe = small_recipe.model_copy(update={"targets": ("tensorrt",)})
    with pytest.raises(UserError, match="needs the Python package tensorrt") as raised:
        build(recipe, tmp_path / "b")
    assert install_command("tensorrt") in str(raised.value.hint)
    assert not (tmp_path / "b").exists()


def test_only_one_module_imports_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(api.__file__).parents[2]
    for path in package.rglob("*.py"):
        if path != Path(api.__file__):
            text = path.read_text()
            assert "import tensorrt" not in text, path
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UserError, match="needs the Python package tensorrt-rtx"):
        api.load_tensorrt("tensorrt-rtx")
