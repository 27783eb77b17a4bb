"""Kernels of real plans of TensorRT for RTX, built here without a GPU."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from artefacts import Artefacts
from command_line import call
from stored_traces import Trace
from test_report import page_text

from variator_export.core.parts import MODEL
from variator_export.core.precision import find_precision
from variator_export.engines.kernels import Schedule, layers_of
from variator_export.engines.request import EngineRequest, Profile
from variator_export.engines.tensorrt.building.builder_process import build_engine
from variator_export.engines.tensorrt.schedule import schedule
from variator_export.graph.bind import bind, bind_baseline
from variator_export.model.backbone import Backbone
from variator_export.model.plugin_file import load_plugin, save_plugin
from variator_export.model.source import plugin_folder
from variator_export.reporting.bundle_report import report


@pytest.fixture(scope="module")
def minilm(
    load_model: Callable[..., Backbone], trace: Trace, artefacts: Artefacts
) -> Callable[[str, int], Schedule]:
    """The kernels of an engine of MiniLM, by precision and ratio."""

    def make(precision: str) -> Callable[[Path], Any]:
        def graphs(folder: Path) -> None:
            backbone = load_model("minilm").in_precision(find_precision(precision))
            ir.save(trace(backbone, folder, "weights.safetensors")[MODEL], folder / "any-ratio.onnx")
            plugin = load_plugin(plugin_folder("recipes:minilm/ratio-4"))
            save_plugin(plugin, folder / "plugin")
            ir.save(bind_baseline(folder / "any-ratio.onnx"), folder / "1.onnx")
            bound = bind(folder / "any-ratio.onnx", plugin.config, "plugin/plugin.safetensors")
            ir.save(bound, folder / "4.onnx")

        return graphs

    def find(precision: str, ratio: int) -> Schedule:
        folder = artefacts.folder(f"kernels/{precision}", make(precision))
        names = ("input_ids", "attention_mask", "token_type_ids")
        profile = Profile(name="usual", shapes=dict.fromkeys(names, ((1, 1), (8, 128), (32, 512))))
        request = EngineRequest(
            target="tensorrt-rtx",
            graph=f"{ratio}.onnx",
            what=f"ratio-{ratio}",
            profiles=(profile,),
            compute_capabilities=("sm89",),
        )
        built = build_engine(request, folder)
        assert built.attention == ("fused-float32" if precision == "float16" else "fused")
        found = schedule(built.content)
        assert found is not None
        return found

    return find


def test_a_layer_with_a_plugin_has_few_kernels(minilm: Callable[[str, int], Schedule]) -> None:
    """Each kernel costs two to three microseconds, whatever it computes."""
    for ratio, most in ((1, 11), (4, 17)):
        found = minilm("bfloat16", ratio)
        assert found.attention_accumulates == "float32"
        counts = found.by_layer
        assert list(counts) == [f"encoder.layer.{index}" for index in range(6)]
        assert found.summary()["per_layer"] <= most, counts
        assert any(kernel.is_of_plugin for kernel in found.kernels) is (ratio == 4)
        # What comes before and after the layers is in the first and the last one, or outside.
        assert len(found.kernels) <= 6 * most + 7


def test_float16_adds_attention_in_float32(minilm: Callable[[str, int], Schedule]) -> None:
    """In float16 itself a sum of many products would lose its last digits, or overflow."""
    found = minilm("float16", 4)
    assert found.attention_accumulates == "float32"
    assert found.summary()["per_layer"] <= 17


def test_inspect_lists_the_kernels_of_an_engine(
    minilm_bundle: Path, small_bundle: Path, tmp_path: Path
) -> None:
    result = call("inspect", str(minilm_bundle), "--kernels", "ratio-4", "--format", "json")
    found = json.loads(result.stdout)
    assert found["engine"].endswith("/ratio-4.engine")
    assert found["attention_accumulates"] is None, "no attention is fused in float32"
    assert len(found["kernels"]) == found["in_layers"] + found["elsewhere"]
    own = [kernel for kernel in found["kernels"] if kernel["layer"] == "encoder.layer.3"]
    assert len(own) == found["per_layer"]
    assert {kernel["kind"] for kernel in own} == {"product", "other"}
    assert 4 <= sum(kernel["is_of_plugin"] for kernel in own) < len(own)
    sidecar = json.loads((minilm_bundle / found["engine"]).with_suffix(".json").read_text())
    assert sidecar["kernels"] == {name: found[name] for name in sidecar["kernels"]}
    text = call("inspect", str(minilm_bundle), "--kernels", "ratio-4").stdout
    assert f"{len(found['kernels'])} kernels: {found['per_layer']} in a layer" in text
    assert "attention: decomposed\n" in text
    page = page_text(report(minilm_bundle, tmp_path / "report.html").page.read_text())
    assert re.search(
        rf"ratio-4, model\s+decomposed\s+{found['per_layer']}\s+{found['elsewhere']}\s+built", page
    )
    for bundle, name, words in (
        (minilm_bundle, "ratio-5", "has no engine ratio-5"),
        (small_bundle, "ratio-2", "has no engines"),
    ):
        result = call("inspect", str(bundle), "--kernels", name)
        assert (result.returncode, words in result.stderr) == (1, True)


def test_a_kernel_without_nodes_is_in_the_layer_around_it() -> None:
    one, two = ("encoder.layer.0.output/Add_1",), ("encoder.layer.1.output/Add_1",)
    assert layers_of([(), one, (), one, (), two, ()]) == [
        None,
        "encoder.layer.0",
        "encoder.layer.0",
        "encoder.layer.0",
        None,
        "encoder.layer.1",
        None,
    ]
    assert layers_of([("embeddings/Gather_1", *one), ("layers.10.mlp/MatMul_1",)]) == [
        "encoder.layer.0",
        "layers.10",
    ]


def test_a_file_of_another_form_has_no_schedule() -> None:
    assert schedule(b"") is None
    assert schedule(b"vtrt\nmain {\n  nothing\n}\n") is None
    nameless = schedule(b"\nmain {\n  function={ fqn= args={ } }\n}\n")
    assert nameless is not None
    assert [kernel.name for kernel in nameless.kernels] == [""]
