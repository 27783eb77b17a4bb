"""One trace serves every ratio: bound graphs and the any-ratio graph compute what eager PyTorch computes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import MODELS, VOCAB_SIZE, plugin_for
from safetensors import safe_open
from safetensors.torch import load_file
from stored_traces import Trace

from variator_export.core.encoder_size import EncoderSize
from variator_export.core.parts import MODEL
from variator_export.engines.eager import EagerModel
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.engines.request import EngineRequest, Profile
from variator_export.engines.tensorrt.building.builder_process import build_engine
from variator_export.graph.bind import bind, bind_baseline
from variator_export.graph.fold import fold_decompression
from variator_export.graph.macs import graph_macs
from variator_export.graph.simplify import module_of, reshape_target
from variator_export.graph.trace import ATTENTION_OPSET
from variator_export.graph.weights import attach_weights, detach_weights
from variator_export.model.augmented import AugmentedModel
from variator_export.model.backbone import Backbone
from variator_export.model.macs import analytic_macs
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_file import save_plugin
from variator_export.model.plugin_layout import Plugin, null_plugin, stack_for_graph
from variator_export.verification.judging.compare import deviation

RATIOS = (2, 3, 4, 8)


class Traced:
    """A backbone traced into a folder; plugins are bound into it on demand."""

    def __init__(self, backbone: Backbone, folder: Path, trace: Trace) -> None:
        self.backbone, self.folder = backbone, folder
        ir.save(trace(backbone, folder, "weights.safetensors")[MODEL], folder / "any-ratio.onnx")
        self.any_ratio = OnnxRuntimeRunner(folder / "any-ratio.onnx")

    def bind(self, plugin: Plugin | None) -> Path:
        if plugin is None:
            path = self.folder / "ratio-1.onnx"
            ir.save(bind_baseline(self.folder / "any-ratio.onnx"), path)
            return path
        name = f"ratio-{plugin.config.ratio}-{plugin.config.masking}"
        save_plugin(plugin, self.folder / "plugins" / name)
        model = bind(self.folder / "any-ratio.onnx", plugin.config, f"plugins/{name}/plugin.safetensors")
        ir.save(model, self.folder / f"{name}.onnx")
        return self.folder / f"{name}.onnx"

    def with_plugin(self, plugin: Plugin) -> OnnxRuntimeRunner:
        return self.any_ratio.with_plugin(stack_for_graph(plugin))


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory, load_model: Callable[[str], Backbone], trace: Trace
) -> Callable[[str], Traced]:
    made: dict[str, Traced] = {}

    def get(name: str) -> Traced:
        if name not in made:
            made[name] = Traced(load_model(name), tmp_path_factory.mktemp(name), trace)
        return made[name]

    return get


def random_inputs(backbone: Backbone, batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of different length, padded on the right."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, batch)
    lengths[0] = length
    keep = np.arange(length) < lengths[:, None]
    values = {
        "input_ids": np.where(keep, rng.integers(0, 30000, (batch, length)), backbone.pad_token_id),
        "attention_mask": keep,
        "token_type_ids": keep & (np.arange(length) > length // 2),
    }
    return {name: values[name].astype(np.int64) for name in backbone.spec.family.inputs}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape
        result = deviation(found[name], values)
        assert result.relative_frobenius < 5e-5, f"{name}: {result}"
        assert result.max_abs < 1e-4 * max(1.0, result.scale), f"{name}: {result}"


@pytest.mark.parametrize("masking", ["none", "exclude-padding"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("model", MODELS)
def test_bound_and_any_ratio_graphs_equal_eager_at_every_length(
    traced: Callable[[str], Traced], model: str, ratio: int, masking: str
) -> None:
    made = traced(model)
    plugin = plugin_for(made.backbone, ratio, masking=masking)
    eager = EagerModel(made.backbone, plugin)
    bound = OnnxRuntimeRunner(made.bind(plugin))
    limit = made.backbone.max_length or 64
    for batch, length in (
        (1, 1), (2, ratio - 1), (1, ratio), (3, ratio + 1), (2, 37), (1, limit - 1), (2, limit)
    ):  # fmt: skip
        inputs = random_inputs(made.backbone, batch, length)
        expected = eager.run(inputs)
        assert_equal(bound.run(inputs), expected)
        assert_equal(made.with_plugin(plugin).run(inputs), expected)


@pytest.mark.parametrize("model", [*MODELS, "minilm"])
def test_the_baseline_is_the_backbone_itself(traced: Callable[[str], Traced], model: str) -> None:
    made = traced(model)
    eager = EagerModel(made.backbone, None)
    path = made.bind(None)
    baseline = OnnxRuntimeRunner(path)
    size = made.backbone.info.size
    null = made.with_plugin(null_plugin(size.num_layers, size.hidden_size))
    for batch, length in ((1, 1), (3, 37), (2, made.backbone.max_length or 64)):
        inputs = random_inputs(made.backbone, batch, length)
        expected = eager.run(inputs)
        assert_equal(baseline.run(inputs), expected)
        assert_equal(null.run(inputs), expected)
        assert_equal(made.any_ratio.run(inputs), expected)  # the null plugin is its default values
    assert b".plugin." not in path.read_bytes()
    graph = onnx.load(path, load_external_data=False).graph
    assert not [node for node in graph.node if node.op_type == "Concat" and set(node.input) & _tokens(graph)]


def test_declared_shapes_are_those_that_onnx_infers(traced: Callable[[str], Traced]) -> None:
    made = traced("minilm")
    for plugin in (
        None,
        plugin_for(made.backbone, 4),
        plugin_for(made.backbone, 2, masking="exclude-padding"),
    ):
        graph = onnx.load(made.bind(plugin), load_external_data=False)
        onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True)


def test_padding_is_done_by_operators_that_every_provider_has(traced: Callable[[str], Traced]) -> None:
    """ONNX Runtime has no int64 Pad for CUDA, and would copy the tokens to the CPU and back in each call."""
    made = traced("minilm")
    for path in (made.folder / "any-ratio.onnx", made.bind(plugin_for(made.backbone, 4))):
        graph = onnx.load(path, load_external_data=False).graph
        longer = {node.output[0] for node in graph.node if set(node.input) & _tokens(graph)}
        assert {node.op_type for node in graph.node if set(node.input) & _tokens(graph)} == {
            "Concat",
            "Shape",
        }
        assert "Pad" not in {node.op_type for node in graph.node}
        assert len([n for n in graph.node if n.op_type == "Slice" and n.input[0] in longer]) == 3


def _tokens(graph: onnx.GraphProto) -> set[str]:
    """Names of the inputs that are not a plugin's."""
    return {value.name for value in graph.input if "." not in value.name}


def test_minilm_at_its_limit_with_a_ratio_that_does_not_divide_it(traced: Callable[[str], Traced]) -> None:
    """512 tokens with k=3 need slot 513, which has no position embedding."""
    made = traced("minilm")
    plugin = plugin_for(made.backbone, 3)
    bound, eager = OnnxRuntimeRunner(made.bind(plugin)), EagerModel(made.backbone, plugin)
    for length in (511, 512):
        inputs = random_inputs(made.backbone, 1, length)
        assert_equal(bound.run(inputs), eager.run(inputs))


class _Direct(torch.nn.Module):
    """The augmented model with a plain interface, for a trace at one ratio."""

    def __init__(self, model: AugmentedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.model({"input_ids": input_ids, "attention_mask": attention_mask}).values())


def test_a_bound_graph_equals_a_direct_trace_at_ratio_4(
    traced: Callable[[str], Traced], tmp_path: Path
) -> None:
    made = traced("t5-v1.1")
    plugin = plugin_for(made.backbone, 4)
    augmented = _Direct(AugmentedModel(made.backbone, CompressionPlugin.from_file(plugin))).eval()
    inputs = random_inputs(made.backbone, 2, 12)
    batch, windows = torch.export.Dim("batch"), torch.export.Dim("windows")
    torch.onnx.export(
        augmented,
        kwargs={name: torch.from_numpy(array) for name, array in inputs.items()},
        f=str(tmp_path / "direct.onnx"),
        dynamo=True,
        opset_version=ATTENTION_OPSET,
        dynamic_shapes={name: {0: batch, 1: 4 * windows} for name in inputs},
        input_names=list(inputs),
        output_names=["last_hidden_state"],
        verbose=False,
    )
    direct, bound = OnnxRuntimeRunner(tmp_path / "direct.onnx"), OnnxRuntimeRunner(made.bind(plugin))
    for batch_size, length in ((1, 4), (3, 36), (2, 64)):
        inputs = random_inputs(made.backbone, batch_size, length)
        assert_equal(bound.run(inputs), direct.run(inputs))


def test_padding_on_the_right_does_not_change_a_row(traced: Callable[[str], Traced]) -> None:
    made = traced("bert")
    for masking in ("none", "exclude-padding"):
        graph = OnnxRuntimeRunner(made.bind(plugin_for(made.backbone, 4, masking=masking)))
        short = random_inputs(made.backbone, 1, 10)
        long = {name: np.pad(array, ((0, 0), (0, 27))) for name, array in short.items()}
        found, expected = graph.run(long)["last_hidden_state"][:, :10], graph.run(short)["last_hidden_state"]
        assert deviation(found, expected).max_abs < 1e-4


def test_nothing_of_the_mask_is_left_where_nothing_is_excluded(traced: Callable[[str], Traced]) -> None:
    made = traced("bert")

    def operators(masking: str) -> set[str]:
        graph = ir.load(made.bind(plugin_for(made.backbone, 2, masking=masking))).graph
        return {node.op_type for node in graph if ".plugin." in module_of(node)}

    assert not {"Where", "Cast"} & operators("none")
    assert {"Where", "Cast"} <= operators("exclude-padding")


@pytest.mark.parametrize("model", MODELS)
def test_an_engine_can_be_built_of_every_family(traced: Callable[[str], Traced], model: str) -> None:
    made = traced(model)
    shapes = ((1, 1), (2, 16), (4, 64))
    profile = dict.fromkeys(made.backbone.spec.family.inputs, shapes)
    graph = made.bind(plugin_for(made.backbone, 3))
    profiles = (Profile(name="default", shapes=profile),)
    request = EngineRequest(target="tensorrt-rtx", graph=graph.name, what="ratio-3", profiles=profiles)
    assert build_engine(request, graph.parent)


def test_weights_keep_the_names_and_bytes_of_the_backbone(traced: Callable[[str], Traced]) -> None:
    made = traced("bert-classifier")
    stored = load_file(made.folder / "weights.safetensors")
    assert stored.keys() == made.backbone.state.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, made.backbone.state[name]), name


# DeBERTa's disentangled attention is another formula.
@pytest.mark.parametrize("model", [name for name in MODELS if not name.startswith("deberta")])
def test_attention_is_one_operator_in_each_layer(traced: Callable[[str], Traced], model: str) -> None:
    made = traced(model)
    for path in (made.folder / "any-ratio.onnx", made.bind(None), made.bind(plugin_for(made.backbone, 2))):
        operators = [node.op_type for node in ir.load(path).graph]
        assert operators.count("Attention") == made.backbone.info.size.num_layers


@pytest.mark.parametrize("model", ["t5-v1.0", "t5-v1.1"])
def test_the_layer_norm_of_t5_is_one_operator(traced: Callable[[str], Traced], model: str) -> None:
    made = traced(model)
    for path in (made.folder / "any-ratio.onnx", made.bind(None), made.bind(plugin_for(made.backbone, 2))):
        nodes = [node for node in ir.load(path).graph if node.op_type == "RMSNormalization"]
        assert len(nodes) == 2 * made.backbone.info.size.num_layers + 1
        assert all(module_of(node).endswith("layer_norm") for node in nodes)


@pytest.mark.parametrize("model", MODELS)
def test_all_graphs_point_into_the_same_files_and_hold_no_weights(
    traced: Callable[[str], Traced], model: str
) -> None:
    made = traced(model)
    path = made.bind(plugin_for(made.backbone, 4))
    for file in (made.folder / "any-ratio.onnx", made.bind(None), path):
        model = onnx.load(file, load_external_data=False)
        locations = {
            entry.value
            for t in model.graph.initializer
            for entry in t.external_data
            if entry.key == "location"
        }
        assert locations <= {"weights.safetensors", "plugins/ratio-4-none/plugin.safetensors"}
        inline = sum(len(t.raw_data) for t in model.graph.initializer if not t.external_data)
        assert inline < 5000, file.name
        onnx.checker.check_model(str(file), full_check=True)


def test_interface_of_a_bound_graph(traced: Callable[[str], Traced]) -> None:
    made = traced("bert-classifier")
    model = ir.load(made.bind(plugin_for(made.backbone, 4)))
    assert [value.name for value in model.graph.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    for value in model.graph.inputs:
        assert [str(dim) for dim in value.shape] == ["batch_size", "sequence_length"]
        assert value.dtype == ir.DataType.INT64
    assert [value.name for value in model.graph.outputs] == ["logits"]


def test_nodes_name_their_module_and_nothing_of_this_machine(traced: Callable[[str], Traced]) -> None:
    content = traced("bert").bind(plugin_for(traced("bert").backbone, 4)).read_bytes()
    assert b"encoder.layer.1.intermediate.plugin.compress" in content
    assert b"site-packages" not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_plugin_tensors_in_half_precision_are_widened_in_the_graph(traced: Callable[[str], Traced]) -> None:
    made = traced("bert")
    wide = plugin_for(made.backbone, 2)
    half = Plugin(wide.config, {name: array.astype(np.float16) for name, array in wide.tensors.items()})
    bound = OnnxRuntimeRunner(made.bind(half))
    with safe_open(made.folder / "plugins/ratio-2-none/plugin.safetensors", "np") as file:
        assert file.get_slice("layers.0.compress.weight").get_dtype() == "F16"
    inputs = random_inputs(made.backbone, 2, 9)
    expected = EagerModel(made.backbone, half).run(inputs)
    assert_equal(bound.run(inputs), expected)
    assert_equal(made.with_plugin(half).run(inputs), expected)


def test_a_traced_backbone_is_left_as_it_was(traced: Callable[[str], Traced]) -> None:
    names = {type(module).__name__ for module in traced("bert").backbone.model.modules()}
    assert "CompressedFeedForward" not in names
    assert "BertIntermediate" in names


# What the formula leaves out: (for each token, for each row).
_OUTSIDE_THE_LAYERS = {
    "bert-classifier": (0, 32 * 32 + 32 * 3),
    "roberta": (32 * 5, 0),
    "xlm-roberta": (32 * 2, 0),
    "electra": (16 * 32 + 32 * 16 + 16 * VOCAB_SIZE, 0),  # embeddings are projected, and back
    "distilbert": (0, 32 * 32 + 32 * 2),
    "deberta-v3": (0, 32 * 32 + 32 * 2),
}


# DeBERTa's first version cuts its relative positions to the length, which the exporter does not follow.
@pytest.mark.parametrize("model", [name for name in MODELS if name != "deberta"])
def test_macs_on_the_graph_are_those_of_the_formula(traced: Callable[[str], Traced], model: str) -> None:
    """Where the length is a multiple of k, the graph computes nothing besides."""
    made = traced(model)
    size = made.backbone.info.size
    for_token, for_row = _OUTSIDE_THE_LAYERS.get(model, (0, 0))
    head = 3 * (24 * for_token + for_row)
    assert graph_macs(made.bind(None), 3, 24) == analytic_macs(size, 3, 24) + head
    path = made.bind(plugin_for(made.backbone, 4))
    assert graph_macs(path, 3, 24, 4) == analytic_macs(size, 3, 24, 4, 5) + head
    # Padding shows on the graph and not in the limit.
    padded = graph_macs(path, 3, 25, 4)
    assert padded is not None
    assert padded > analytic_macs(size, 3, 25, 4, 5) + 3 * (25 * for_token + for_row)


def test_macs_that_cannot_be_counted_are_unknown(traced: Callable[[str], Traced]) -> None:
    assert graph_macs(traced("deberta").bind(None), 3, 24) is None


@pytest.mark.parametrize(
    ("size", "paper", "split"),
    [
        (EncoderSize(12, 768, 768, 3072, 2), (30.4, 46.6, 45.3, 54.6), (30.7, 47.1, 45.8, 55.2)),
        (EncoderSize(24, 1024, 1024, 4096, 2), (31.1, 47.4, 46.5, 55.5), (31.4, 47.8, 46.8, 56.0)),
    ],
    ids=["t5-base", "t5-large"],
)
def test_savings_of_t5_are_those_counted_by_hand(
    size: EncoderSize, paper: tuple[float, ...], split: tuple[float, ...]
) -> None:
    """In per cent, in the form of the paper's code and in the split form, with a bottleneck of 64."""
    for (k, n), in_paper, in_split in zip(
        ((2, 128), (4, 128), (4, 256), (8, 128)), paper, split, strict=True
    ):
        whole, compressed = analytic_macs(size, 1, n), analytic_macs(size, 1, n, k, 64)
        assert round(100 * (1 - compressed / whole), 1) == in_split
        # The half of `down` on the network's output: for each token there, for each window here.
        repeated = size.num_layers * (n - n / k) * size.hidden_size * 64
        assert round(100 * (1 - (compressed + repeated) / whole), 1) == in_paper


@pytest.mark.parametrize("model", ["bert", "t5-v1.1", "modernbert", "deberta"])
def test_folding_the_decompression_keeps_the_numbers(traced: Callable[[str], Traced], model: str) -> None:
    made = traced(model)
    plugin = plugin_for(made.backbone, 4)
    path = made.bind(plugin)
    graph = ir.load(path)
    held = detach_weights(graph.graph)
    assert fold_decompression(graph.graph, held, ir.DataType.FLOAT) == made.backbone.info.size.num_layers
    attach_weights(graph.graph, held)
    assert fold_decompression(graph.graph, held, ir.DataType.FLOAT) == 0, "once is enough"
    folded = path.with_name("folded.onnx")
    ir.save(graph, folded)
    inputs = random_inputs(made.backbone, 3, 23)
    before, after = OnnxRuntimeRunner(path).run(inputs), OnnxRuntimeRunner(folded).run(inputs)
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=0, atol=3e-6 * np.abs(values).max())


def test_reshape_targets() -> None:
    shape = ir.Shape
    assert reshape_target(shape(["b", "4*w", 12]), shape(["b", "w", 4, 12])) == [0, -1, 4, 12]
    assert reshape_target(shape(["b", "n", 12]), shape(["b", "n", 3, 4])) == [0, 0, 3, 4]
    assert reshape_target(shape(["b", "n"]), shape(["x", "y"])) is None
    assert reshape_target(None, shape([1])) is None
