"""Plugin inputs of engines for every ratio: one for each layer, in the precision of the graph."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from artefacts import Artefacts
from conftest import plugin_for, ratio_2_and_any_ratio
from host_gpu import HostGpu, OpenGraph
from stored_traces import Trace

from variator_export import Bundle, UserError
from variator_export.core.parts import MODEL
from variator_export.core.precision import BFLOAT16, FLOAT16, FLOAT32, Precision
from variator_export.engines import choice
from variator_export.engines.compatibility import TargetMachine
from variator_export.engines.graph_file import load_without_defaults
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.engines.request import Profile
from variator_export.engines.tensorrt import session
from variator_export.engines.tensorrt.plugin_inputs import engine_shapes, plugin_tensors, unstack
from variator_export.model.backbone import Backbone
from variator_export.model.plugin_file import load_plugin, save_plugin
from variator_export.model.plugin_layout import (
    EXCLUDE_PADDING_INPUT,
    Plugin,
    plugin_input_shapes,
    stack_for_graph,
)

TYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
TYPES |= {onnx.TensorProto.BFLOAT16: "bfloat16", onnx.TensorProto.INT64: "int64"}


@pytest.fixture
def unstacked(
    load_model: Callable[..., Backbone], trace: Trace, tmp_path: Path
) -> Callable[[str, Precision], tuple[Backbone, onnx.ModelProto]]:
    """A family's graph for every ratio with inputs for each layer; the graph as traced is any-ratio.onnx."""

    def make(model: str, precision: Precision) -> tuple[Backbone, onnx.ModelProto]:
        backbone = load_model(model).in_precision(precision)
        ir.save(trace(backbone, tmp_path, "weights.safetensors")[MODEL], tmp_path / "any-ratio.onnx")
        made = load_without_defaults(tmp_path / "any-ratio.onnx", "tensorrt", "A test")
        unstack(made)
        return backbone, made

    return make


def _input_types(model: onnx.ModelProto) -> dict[str, str]:
    return {value.name: TYPES[value.type.tensor_type.elem_type] for value in model.graph.input}


@pytest.mark.parametrize("masking", ["none", "exclude-padding"])
@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("bert", FLOAT32),
        ("bert", FLOAT16),
        ("modernbert", FLOAT32),
        ("t5-v1.1", FLOAT32),
        ("deberta-v3", FLOAT32),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_graph_computes_the_same(
    unstacked: Callable[[str, Precision], tuple[Backbone, onnx.ModelProto]],
    tmp_path: Path,
    model: str,
    precision: Precision,
    masking: str,
) -> None:
    backbone, made = unstacked(model, precision)
    types = _input_types(made)
    ids = np.random.default_rng(0).integers(5, 900, (3, 21))
    mask = (np.arange(21) < np.array([[21], [13], [1]])).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * 0}
    inputs = {name: inputs[name] for name in backbone.spec.family.inputs}
    for ratio in (2, 5):
        stacked = stack_for_graph(plugin_for(backbone, ratio, masking=masking))
        given = dict(plugin_tensors(stacked, types))
        assert {*given, *inputs} == {*types}
        found = OnnxRuntimeRunner(made.SerializeToString(), given, weights=tmp_path).run(inputs)
        for name, expected in OnnxRuntimeRunner(tmp_path / "any-ratio.onnx", stacked).run(inputs).items():
            # On a CPU float16 is computed in float32 and rounded wherever graphs were cut.
            atol = 0 if precision is FLOAT32 else 2.0**-9 * np.abs(expected).max()
            np.testing.assert_allclose(found[name], expected, atol=atol, rtol=0)


def test_each_layer_has_its_inputs_in_the_precision_of_the_graph(
    unstacked: Callable[[str, Precision], tuple[Backbone, onnx.ModelProto]],
) -> None:
    backbone, made = unstacked("bert", BFLOAT16)
    types = _input_types(made)
    tensors = ["compress.weight", "compress.bias", "decompress.up.weight", "decompress.up.bias"]
    tensors += ["decompress.down.bias", "decompress.down.weight[0:32]", "decompress.down.weight[32:64]"]
    own = {f"plugin.layers.{layer}.{name}" for layer in range(2) for name in tensors}
    assert {name for name in types if name.startswith("plugin.")} == {*own, EXCLUDE_PADDING_INPUT}
    assert {types[name] for name in own} == {"bfloat16"}
    read = {name for node in made.graph.node for name in node.input}
    assert own <= read
    # Nothing selects or cuts a plugin's tensor in a call.
    for node in made.graph.node:
        assert node.op_type not in ("Gather", "Slice") or not own & {*node.input}
    plugin = plugin_for(backbone, 4)
    given = dict(plugin_tensors(stack_for_graph(plugin), types))
    assert {str(given[name].dtype) for name in own} == {"bfloat16"}
    varying = [name for name in own if name != "plugin.layers.0.decompress.up.bias"]
    shapes = engine_shapes(plugin_input_shapes(plugin.config), varying)
    assert len(shapes) == 12, "all but the biases of `up`"
    assert shapes == {name: given[name].shape for name in shapes}


@pytest.fixture
def opened(
    artefacts: Artefacts, small_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., session.TensorRtSession]:
    """A session on an engine for every ratio, in whose place is the graph that it was built of."""
    place = TargetMachine("this machine", "sm89", {"tensorrt-rtx": "1.7.1.116"})
    monkeypatch.setattr(choice, "this_machine", lambda: place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle, gpu = Bundle.load(ratio_2_and_any_ratio(artefacts, small_bundle)), HostGpu()
    made = load_without_defaults(bundle.graph("any-ratio.onnx"), "tensorrt", "A test")
    unstack(made)
    onnx.external_data_helper.load_external_data_for_model(made, str(small_bundle))
    (entry,) = bundle.engines("tensorrt-rtx", "any-ratio")
    profiles = [Profile.model_validate(profile) for profile in bundle.sidecar(entry)["profiles"]]
    plan = OpenGraph(made.SerializeToString(), gpu, profiles)
    monkeypatch.setattr(session, "open_engine", lambda *_, **__: plan)

    def open_session(**options: bool) -> session.TensorRtSession:
        return session.TensorRtSession(bundle, "tensorrt-rtx", allow_unverified=True, device=gpu, **options)

    return open_session


def test_a_session_gives_an_engine_the_tensors_of_each_layer(
    opened: Callable[..., session.TensorRtSession], small_bundle: Path
) -> None:
    bundle, made = Bundle.load(small_bundle), opened()
    inputs = dict.fromkeys(bundle.manifest.backbone.inputs, np.ones((2, 11), np.int64))
    every = bundle.session()
    for ratio in (4, 1, 2):
        expected = every.run(inputs, ratio=ratio)
        for name, array in made.run(inputs, ratio=ratio).items():
            np.testing.assert_allclose(array, expected[name], atol=1e-6)
    assert made.run(inputs, outputs=[]) == {}
    with pytest.raises(UserError, match="The outputs logits were asked for"):
        made.run(inputs, outputs=["logits"])


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["no graphs", "graphs"])
def test_a_replaced_plugin_is_used_from_the_next_call_on(
    opened: Callable[..., session.TensorRtSession], small_bundle: Path, tmp_path: Path, cuda_graphs: bool
) -> None:
    bundle, made = Bundle.load(small_bundle), opened(cuda_graphs=cuda_graphs)
    plugin = load_plugin(small_bundle / "plugins" / "ratio-2")
    tensors = {name: 2 * array for name, array in plugin.tensors.items()}
    save_plugin(Plugin(plugin.config, tensors), tmp_path / "other")
    inputs = dict.fromkeys(bundle.manifest.backbone.inputs, np.ones((2, 11), np.int64))
    every, before = bundle.session(), made.run(inputs, ratio=2)
    for own in (every, made):
        own.add_plugin("ratio-2", tmp_path / "other")
    for name, expected in every.run(inputs, ratio=2).items():
        np.testing.assert_allclose(made.run(inputs, ratio=2)[name], expected, atol=1e-6)
        assert np.abs(expected - before[name]).max() > 1e-2
