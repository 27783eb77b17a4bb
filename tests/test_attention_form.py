"""Attention in TensorRT's network: in which families float16 can be added in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from conftest import plugin_for
from stored_traces import Trace

from variator_export.core.parts import MODEL
from variator_export.core.precision import BFLOAT16, FLOAT16, Precision
from variator_export.engines.tensorrt.building.attention import apply_form, attentions
from variator_export.engines.tensorrt.log import make_log
from variator_export.graph.bind import bind
from variator_export.model.backbone import Backbone
from variator_export.model.plugin_file import save_plugin

trt = pytest.importorskip("tensorrt_rtx")

# Attention operators of two layers, and how many have a mask of keys alone. A position bias is a mask of
# numbers. In a sliding window each query sees other keys. DeBERTa's attention is no operator.
OPERATORS = {
    "bert": (2, 2),
    "roberta": (2, 2),
    "electra": (2, 2),
    "distilbert": (2, 2),
    "modernbert": (2, 1),
    "t5-v1.0": (2, 0),
    "mpnet": (2, 0),
    "deberta": (0, 0),
}


@pytest.fixture
def network(load_model: Callable[..., Backbone], trace: Trace, tmp_path: Path) -> Callable[..., Any]:
    """The network of a family's graph at ratio 2, by the family's name and a precision."""
    kept = []

    def make(model: str, precision: Precision) -> Any:
        backbone = load_model(model, layers=2).in_precision(precision)
        ir.save(trace(backbone, tmp_path, "weights.safetensors")[MODEL], tmp_path / "any-ratio.onnx")
        plugin = plugin_for(backbone, 2)
        save_plugin(plugin, tmp_path / "plugin")
        bound = bind(tmp_path / "any-ratio.onnx", plugin.config, "plugin/plugin.safetensors")
        ir.save(bound, tmp_path / "2.onnx")
        log = make_log(trt)
        builder = trt.Builder(log)
        made = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(made, log)
        assert parser.parse_from_file(str(tmp_path / "2.onnx")), log.messages
        kept.extend([builder, parser])
        return made

    return make


@pytest.mark.parametrize("model", OPERATORS)
def test_attention_in_float16_is_added_in_float32_where_a_bool_mask_can_say_the_same(
    network: Callable[..., Any], model: str
) -> None:
    made = network(model, FLOAT16)
    count, replaced = OPERATORS[model]
    assert apply_form(trt, made, "float32 sums") is bool(replaced)
    found = list(attentions(trt, made))
    assert len(found) == count
    wide = [attention for attention in found if attention.mask.dtype == trt.DataType.BOOL]
    assert len(wide) == replaced
    for attention in found:
        types = {attention.get_input(index).dtype for index in range(3)} | {attention.get_output(0).dtype}
        assert types == {trt.DataType.FLOAT if attention in wide else trt.DataType.HALF}
        assert not attention.decomposable
    layers = [made.get_layer(index) for index in range(made.num_layers)]
    outputs = {attention.get_output(0).name for attention in wide}
    readers = [
        layer
        for layer in layers
        for index in range(layer.num_inputs)
        if (tensor := layer.get_input(index)) is not None and tensor.name in outputs
    ]
    assert len(readers) == replaced, "the cast back to float16 alone reads the output"
    assert all(layer.get_output(0).dtype == trt.DataType.HALF for layer in readers)


@pytest.mark.parametrize(
    ("kept", "hidden", "is_replaced"),
    [
        ("zero", "lowest", True),
        ("bias", "lowest", False),
        ("lowest", "zero", False),
        ("zero", "little", False),
    ],
)
def test_only_a_mask_that_hides_keys_is_replaced(
    tmp_path: Path, kept: str, hidden: str, is_replaced: bool
) -> None:
    """A bias in its place would be lost, and a mask of what is padding would be turned around."""
    half = onnx.TensorProto.FLOAT16
    given = [("x", half, ["b", "n", 64]), ("keep", onnx.TensorProto.BOOL, ["b", 1, 1, "n"])]
    values = {"zero": 0.0, "lowest": -32752.0, "little": -3.0}
    constants = [onnx.helper.make_tensor(name, half, [], [value]) for name, value in values.items()]
    constants.append(onnx.helper.make_tensor("bias", half, [1, 1, 1, 4], [0.0, 1.0, 2.0, 3.0]))
    nodes = [
        onnx.helper.make_node("Where", ["keep", kept, hidden], ["mask"]),
        onnx.helper.make_node(
            "Attention", ["x", "x", "x", "mask"], ["y"], q_num_heads=2, kv_num_heads=2, scale=0.2
        ),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "one",
        [onnx.helper.make_tensor_value_info(*each) for each in given],
        [onnx.helper.make_tensor_value_info("y", half, ["b", "n", 64])],
        constants,
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]), tmp_path / "one.onnx"
    )
    log = make_log(trt)
    builder = trt.Builder(log)
    made = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(made, log)
    assert parser.parse_from_file(str(tmp_path / "one.onnx")), log.messages
    assert apply_form(trt, made, "float32 sums") is is_replaced


def test_other_precisions_stay_as_exported(network: Callable[..., Any]) -> None:
    made = network("bert", BFLOAT16)
    before = made.num_layers
    assert not apply_form(trt, made, "float32 sums")
    assert apply_form(trt, made, "as exported")
    assert made.num_layers == before
    assert apply_form(trt, made, "decomposed")
    assert all(attention.decomposable for attention in attentions(trt, made))
