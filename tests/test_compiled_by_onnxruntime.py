"""Graphs that ONNX Runtime's TensorRT compiles: what they compute, and what the provider is told."""

import importlib.machinery
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import plugin_for
from stored_traces import Trace

from variator_export.core.errors import UserError
from variator_export.core.parts import MODEL
from variator_export.core.precision import BFLOAT16
from variator_export.engines.onnxruntime import plugin_provider
from variator_export.engines.onnxruntime.compiled_bundle import profiles_of
from variator_export.engines.onnxruntime.compiler import compilable
from variator_export.engines.onnxruntime.graph import IoBindingRunner, OnnxRuntimeRunner
from variator_export.engines.onnxruntime.providers import CPU, PROVIDERS
from variator_export.engines.request import EngineRequest, Profile
from variator_export.engines.tensorrt.building.builder_process import build_engine
from variator_export.graph.bind import bind
from variator_export.model.backbone import Backbone
from variator_export.model.plugin_file import save_plugin
from variator_export.model.plugin_layout import GRAPH_INPUT_PREFIX, stack_for_graph
from variator_export.sessions import Bundle


@pytest.mark.parametrize("model", ["bert", "modernbert", "t5-v1.0"])
def test_the_form_that_tensorrt_compiles_computes_the_same(
    load_model: Callable[..., Backbone], trace: Trace, tmp_path: Path, model: str
) -> None:
    """TensorRT has no fused kernel for float32 attention, and refuses the operator in a plain graph."""
    backbone = load_model(model)
    ir.save(trace(backbone, tmp_path, "weights.safetensors")[MODEL], tmp_path / "any-ratio.onnx")
    plugin = plugin_for(backbone, 2)
    save_plugin(plugin, tmp_path / "plugin")
    ir.save(
        bind(tmp_path / "any-ratio.onnx", plugin.config, "plugin/plugin.safetensors"), tmp_path / "2.onnx"
    )
    ids = np.random.default_rng(0).integers(5, 900, (3, 21))
    mask = (np.arange(21) < np.array([[21], [13], [1]])).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * 0}
    inputs = {name: inputs[name] for name in backbone.spec.family.inputs}
    for graph, extra in (("2.onnx", {}), ("any-ratio.onnx", stack_for_graph(plugin))):
        content, weights = compilable(tmp_path / graph)
        assert tmp_path / "weights.safetensors" in weights
        found = OnnxRuntimeRunner(content, extra, weights=tmp_path).run(inputs)
        for name, expected in OnnxRuntimeRunner(tmp_path / graph, extra).run(inputs).items():
            np.testing.assert_allclose(found[name], expected, atol=1e-5 * np.abs(expected).max())
        form = onnx.load_from_string(content).graph
        assert "Attention" not in {node.op_type for node in form.node}
        assert not {t.name for t in form.initializer} & {v.name for v in form.input}, "a default is left"
    (tmp_path / "form.onnx").write_bytes(compilable(tmp_path / "2.onnx").content)
    shapes = dict.fromkeys(backbone.spec.family.inputs, ((1, 1), (2, 16), (4, 64)))
    request = EngineRequest(
        target="tensorrt-rtx",
        graph="form.onnx",
        what="the form",
        profiles=(Profile(name="usual", shapes=shapes),),
    )
    assert build_engine(request, tmp_path).attention is None


def test_half_precision_keeps_its_fused_attention(
    load_model: Callable[..., Backbone], trace: Trace, tmp_path: Path
) -> None:
    backbone = load_model("bert").in_precision(BFLOAT16)
    ir.save(trace(backbone, tmp_path, "weights.safetensors")[MODEL], tmp_path / "any-ratio.onnx")
    form = onnx.load_from_string(compilable(tmp_path / "any-ratio.onnx").content).graph
    assert [node.op_type for node in form.node].count("Attention") == 2


def test_a_session_for_every_ratio_has_a_profile_for_each_shape_of_plugins_or_one_for_all(
    small_bundle: Path,
) -> None:
    """ONNX Runtime's TensorRT would stay on the first of several; the one for RTX changes."""
    bundle = Bundle.load(small_bundle)
    graph = compilable(bundle.graph("any-ratio.onnx"))
    compiler = PROVIDERS["onnxruntime-tensorrt-rtx"].compiler
    assert compiler is not None
    profiles = profiles_of(bundle, compiler, None)
    assert len(profiles) == len({variant.ratio for variant in bundle.manifest.variants})
    options = compiler.options(graph, profiles)
    assert options["nv_multi_profile_enable"] == "1"
    for end in ("min", "opt", "max"):
        entries = options[f"nv_profile_{end}_shapes"].split(",")
        names = [entry.partition(":")[0] for entry in entries]
        assert names.count("input_ids") == names.count(GRAPH_INPUT_PREFIX + "compress.bias") == len(profiles)
    assert f"{GRAPH_INPUT_PREFIX}compress.bias:2x2" in entries

    compiler = PROVIDERS["onnxruntime-tensorrt"].compiler
    assert compiler is not None
    (one,) = profiles_of(bundle, compiler, None)
    low, _, high = one.shapes[GRAPH_INPUT_PREFIX + "compress.bias"]
    assert (low, high) == ((2, 1), (2, max(variant.ratio for variant in bundle.manifest.variants)))
    assert one.shapes["input_ids"] == ((1, 1), (8, 64), (32, 64))
    for profile in profiles:
        assert one.covers({name: ends[2] for name, ends in profile.shapes.items()})
    # Around one profile alone, it is that one.
    assert [p.shapes for p in profiles_of(bundle, compiler, "ratio-2")] == [
        p.shapes for p in profiles_of(bundle, PROVIDERS["onnxruntime-tensorrt-rtx"].compiler, "ratio-2")
    ]


def test_the_cache_is_that_of_the_weights(small_bundle: Path, tmp_path: Path) -> None:
    """A graph names its weights and does not hold them; the provider would take another model's engine."""
    compiler = PROVIDERS["onnxruntime-tensorrt"].compiler
    assert compiler is not None
    shutil.copytree(small_bundle, tmp_path / "other")
    before = compiler.options(compilable(tmp_path / "other" / "ratio-2.onnx"), ())
    assert before == compiler.options(compilable(small_bundle / "ratio-2.onnx"), ())
    plugin = tmp_path / "other" / "plugins" / "ratio-2" / "plugin.safetensors"
    plugin.write_bytes(plugin.read_bytes()[:-1] + b"x")
    after = compiler.options(compilable(tmp_path / "other" / "ratio-2.onnx"), ())
    assert before["trt_engine_cache_path"] != after["trt_engine_cache_path"]


def test_shapes_that_were_not_compiled_are_refused_before_they_run(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    profiles = profiles_of(bundle, PROVIDERS["onnxruntime-tensorrt"].compiler, "ratio-2")
    graph = IoBindingRunner(bundle.graph("ratio-2.onnx"), CPU, profiles=profiles, bind=True)
    names = bundle.manifest.backbone.inputs
    assert graph.covers(dict.fromkeys(names, (32, 64)))
    assert not graph.covers(dict.fromkeys(names, (33, 64)))
    assert "32x64" in graph.limits
    inputs = dict.fromkeys(names, np.ones((33, 8), np.int64))
    with pytest.raises(UserError, match=r"was compiled for .*32x64.*, and not for .*33, 8") as raised:
        graph.run(inputs, {}, graph.outputs)
    assert "engine.profiles" in str(raised.value.hint)


def test_the_provider_of_another_distribution_is_loaded_or_refused(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `pip install onnxruntime-ep-nv-tensorrt-rtx` adds it; it needs a driver that is not here."""
    name, target = "NvTensorRTRTXExecutionProvider", "onnxruntime-tensorrt-rtx"
    module = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    module.get_library_path = lambda: tmp_path / "absent.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(plugin_provider, "_loaded", set())
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = Bundle.load(small_bundle)
    with pytest.raises(
        UserError, match=r"cannot load onnxruntime_ep_nv_tensorrt_rtx: .*absent\.so"
    ) as raised:
        bundle.session(target, 2)
    assert "NVIDIA's driver" in str(raised.value.hint)
    registered: list[tuple[str, str]] = []
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda *given: registered.append(given)
    )
    with pytest.raises(UserError, match="onnxruntime_ep_nv_tensorrt_rtx finds no GPU here"):
        bundle.session(target, 2)
    devices = [types.SimpleNamespace(ep_name=kind) for kind in ("CPUExecutionProvider", name, name)]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices)
    given: list[Any] = []

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_provider_for_devices(self, *arguments: Any) -> None:
            given.append(arguments)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    with pytest.raises(UserError, match=f"has {name}, but cannot start it here"):
        bundle.session(target, 2)  # the stand-in adds nothing, so the CPU would run it
    ((chosen, options),) = given
    assert chosen == devices[1:2]
    assert set(options) == {
        *(f"nv_profile_{end}_shapes" for end in ("min", "opt", "max")),
        "nv_runtime_cache_path",
    }
    assert registered == [(name, str(tmp_path / "absent.so"))], "once for each process"


@pytest.mark.parametrize("target", ["onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"])
def test_float32_products_in_tf32_are_refused(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    available = [provider.name for provider in PROVIDERS.values()]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    with pytest.raises(UserError, match=r"would compute the float32 products of .* in TF32") as raised:
        Bundle.load(small_bundle).session(target)
    assert "NVIDIA_TF32_OVERRIDE=0" in str(raised.value.hint)


def test_a_cache_that_cannot_be_created_is_an_error(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiler = PROVIDERS["onnxruntime-tensorrt"].compiler
    assert compiler is not None
    with pytest.raises(UserError, match="for compiled graphs cannot be created") as raised:
        compiler.options(compilable(small_bundle / "any-ratio.onnx"), ())
    assert "XDG_CACHE_HOME" in str(raised.value.hint)
