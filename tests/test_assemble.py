"""Assemblies: the specification, and graphs of an assembly that compute what eager PyTorch computes."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import MODELS, VOCAB_SIZE, plugin_for
from hypothesis import given
from hypothesis import strategies as st
from stored_traces import Trace

from variator_export.bundle.branches import BRANCHES_INPUT, branches_of, switches
from variator_export.bundle.variant_files import VariantFiles
from variator_export.core.assembly import (
    DECODER_STACK,
    ENCODER_STACK,
    Assembly,
    Span,
    Stack,
    parse_assembly,
    possible_spans,
)
from variator_export.core.errors import UserError
from variator_export.core.parts import MODEL
from variator_export.engines.eager import EagerModel
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.graph.assemblies.variant import assemble_any
from variator_export.model.backbone import Backbone
from variator_export.model.methods.modular import MODULAR
from variator_export.model.modular.assembled import copied_layer, layers_of, state_of_modules
from variator_export.model.modular.layout import ModuleConfig, even_groups, prefix_of
from variator_export.model.modular.weights import ModuleSet, load_modules, save_modules
from variator_export.model.plugin_file import save_plugin
from variator_export.verification.judging.compare import deviation


def random_modules(
    backbone: Backbone, granularity: int, stack: Stack = ENCODER_STACK, start: str = "last"
) -> ModuleSet:
    """Modules whose weights are far from those of the layers they are like."""
    num_layers = len(layers_of(backbone, stack))
    groups = even_groups(num_layers, granularity, start)
    config = ModuleConfig(
        stack=stack,
        granularity=granularity,
        num_layers=num_layers,
        hidden_size=backbone.info.size.hidden_size,
        modules=groups,
        backbone=backbone.info.identity,
    )
    layers = [copied_layer(backbone, stack, group) for group in groups]
    tensors = state_of_modules(backbone.spec.family, layers)
    generator = torch.Generator().manual_seed(granularity)
    changed = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }
    return ModuleSet(f"g{granularity}", config, changed)


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=20).map(tuple),
    st.lists(st.integers(1, 12), max_size=20).map(tuple),
    st.sampled_from([None, 2, 4]),
)
def test_a_specification_is_read_as_it_is_written(
    encoder: tuple[int, ...], decoder: tuple[int, ...], ratio: int | None
) -> None:
    assembly = Assembly(encoder, decoder)
    text = str(assembly) + (f";k={ratio}" if ratio else "")
    assert parse_assembly(text) == (assembly, ratio)
    spans = assembly.spans(ENCODER_STACK, sum(encoder))
    assert [span.granularity for span in spans] == list(encoder)
    assert [layer for span in spans for layer in range(span.first, span.last + 1)] == list(
        range(sum(encoder))
    )


def test_short_forms() -> None:
    assert parse_assembly("2x3") == (Assembly((2, 2, 2)), None)
    assert parse_assembly("dec=6,6; enc=2x3 ;k=4") == (Assembly((2, 2, 2), (6, 6)), 4)
    assert Assembly((2, 2, 1, 1), (6,)).name == "enc-2x2-1x2_dec-6"


@pytest.mark.parametrize(
    "text", ["", "enc=", "enc=2,,2", "enc=0", "2x0", "foo=2", "enc=2;enc=2", "k=0", "-1", "²"]
)
def test_what_is_no_specification_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="assembly"):
        parse_assembly(text)


def test_granularities_that_do_not_add_up() -> None:
    with pytest.raises(UserError, match=r"dec=2,1 adds up to 3 layers; the decoder has 6") as error:
        Assembly((), (2, 1)).spans(DECODER_STACK, 6)
    assert "add up to 6" in str(error.value.hint)


@given(st.integers(1, 8), st.sets(st.integers(2, 4)))
def test_every_way_to_cover_a_stack_is_listed_once(num_layers: int, granularities: set[int]) -> None:
    modules = {group.span for g in granularities for group in even_groups(num_layers, g)}
    found = list(possible_spans(num_layers, modules))
    assert len(set(found)) == len(found)
    assert found[0] == tuple(Span(i, i) for i in range(num_layers))
    for spans in found:
        assert [layer for s in spans for layer in range(s.first, s.last + 1)] == list(range(num_layers))
        assert all(span.granularity == 1 or span in modules for span in spans)


def test_the_assemblies_of_six_layers() -> None:
    spans = {group.span for g in (2, 3) for group in even_groups(6, g)}
    assert len(list(possible_spans(6, spans))) == 13


class Traced:
    """A traced model of four layers with modules for all of its groups, in one folder as in a bundle."""

    def __init__(self, backbone: Backbone, folder: Path, trace: Trace) -> None:
        self.backbone, self.folder = backbone, folder
        ir.save(trace(backbone, folder, "weights.safetensors")[MODEL], self.any_ratio)
        sets = {f"g{g}": random_modules(backbone, g) for g in (2, 3, 4)}
        for name, modules in sets.items():
            save_modules(modules, folder / "modules" / name)
        save_plugin(plugin_for(backbone, 2, masking="exclude-padding"), folder / "plugins/ratio-2")
        spans = {group.span: name for name, m in sets.items() for group in m.config.modules}
        self.branches = branches_of(ENCODER_STACK, 4, [spans])
        self.assemblies = [
            Assembly(tuple(span.granularity for span in found)) for found in possible_spans(4, spans)
        ]
        self.folders = tuple(f"modules/{name}" for name in sets)
        model = assemble_any(self.any_ratio, self.branches, self.folders, backbone.info)
        ir.save(model, folder / "any-assembly.onnx")
        self.any_assembly = OnnxRuntimeRunner(folder / "any-assembly.onnx")

    @property
    def any_ratio(self) -> Path:
        return self.folder / "any-ratio.onnx"

    def files(self, assembly: Assembly, *, plugin: bool) -> VariantFiles:
        names = {name.rpartition("/")[2] for name in self.folders}
        on = switches(self.branches, assembly, names, {ENCODER_STACK: 4})
        return VariantFiles(self.folder, "plugins/ratio-2" if plugin else None, assembly, self.folders, on)

    def inputs(self, files: VariantFiles) -> dict[str, np.ndarray]:
        assert files.switches is not None
        return {**MODULAR.graph_inputs(self.backbone.info.size, files), BRANCHES_INPUT: files.switches}


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory, load_model: Callable[..., Backbone], trace: Trace
) -> Callable[[str], Traced]:
    made: dict[str, Traced] = {}

    def get(name: str) -> Traced:
        if name not in made:
            made[name] = Traced(load_model(name, 4), tmp_path_factory.mktemp(name), trace)
        return made[name]

    return get


def inputs_of(backbone: Backbone, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    keep = np.arange(11) < np.array([11, 4])[:, None]
    values = {
        "input_ids": np.where(keep, rng.integers(5, VOCAB_SIZE, keep.shape), backbone.pad_token_id),
        "attention_mask": keep.astype(np.int64),
        "token_type_ids": np.zeros(keep.shape, np.int64),
    }
    return {name: values[name].astype(np.int64) for name in backbone.spec.family.inputs}


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_assembly_computes_what_eager_pytorch_computes(
    name: str, plugin: bool, traced: Callable[[str], Traced]
) -> None:
    made = traced(name)
    backbone, inputs = made.backbone, inputs_of(made.backbone)
    assert len(made.assemblies) == 6
    exact = backbone.to_dtype(torch.float64)
    for assembly in made.assemblies:
        files = made.files(assembly, plugin=plugin)
        expected = EagerModel(exact, MODULAR.eager(exact, files)).run(inputs)
        extra = made.inputs(files)
        results = {"any-assembly": made.any_assembly.with_plugin(extra).run(inputs)}
        if assembly.encoder in ((1, 1, 1, 1), (2, 1, 1), (4,)) or name in ("bert", "t5-v1.0"):
            path = made.folder / f"{assembly.name}-{plugin}.onnx"
            ir.save(MODULAR.bind(made.any_ratio, files, backbone.info), path)
            results["own"] = OnnxRuntimeRunner(path).run(inputs)
        for graph, found in results.items():
            for output, array in expected.items():
                error = deviation(found[output], array)
                assert error.relative_frobenius < 2e-5, (assembly, graph, output, error)


def test_a_module_of_the_wrong_group_is_seen(traced: Callable[[str], Traced], tmp_path: Path) -> None:
    """Two modules that are swapped compute something else, so the test above would fail."""
    made = traced("bert")
    assembly = Assembly((2, 2))
    files, inputs = made.files(assembly, plugin=False), inputs_of(made.backbone)
    path = tmp_path / "swapped"
    shutil.copytree(made.folder, path)
    modules = load_modules(path / "modules/g2")
    other = {0: 1, 1: 0}
    swapped = {
        f"{prefix_of(other[index])}{name}": tensor
        for index in other
        for name, tensor in modules.state(index).items()
    }
    save_modules(ModuleSet("g2", modules.config, swapped), path / "modules/g2")
    extra = made.inputs(files)
    right = made.any_assembly.with_plugin(extra).run(inputs)
    wrong = OnnxRuntimeRunner(path / "any-assembly.onnx", extra).run(inputs)
    assert deviation(wrong["last_hidden_state"], right["last_hidden_state"]).relative_frobenius > 1e-2


def test_weights_are_in_the_graph_of_all_assemblies_once(traced: Callable[[str], Traced]) -> None:
    made = traced("bert")
    graph = ir.load(made.folder / "any-assembly.onnx").graph
    external = [
        v.const_value for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
    ]
    places = [(tensor.location, tensor.offset) for tensor in external]
    assert len(set(places)) == len(places)
    assert {str(location) for location, _ in places} == {
        "weights.safetensors",
        *(f"{folder}/modules.safetensors" for folder in made.folders),
    }


def test_the_graph_of_all_assemblies_runs_the_original_by_default(traced: Callable[[str], Traced]) -> None:
    made = traced("bert")
    inputs = inputs_of(made.backbone)
    found = made.any_assembly.run(inputs)
    expected = OnnxRuntimeRunner(made.any_ratio).run(inputs)
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


@pytest.mark.parametrize("start", ["first", "middle"])
def test_a_module_may_be_like_any_layer_of_its_group(
    start: str, traced: Callable[[str], Traced], tmp_path: Path
) -> None:
    """T5's position bias is in the first layer, which the module may not be like."""
    made = traced("t5-v1.0")
    path = tmp_path / "other"
    shutil.copytree(made.folder, path)
    save_modules(random_modules(made.backbone, 3, start=start), path / "modules/g3")
    files = dataclasses.replace(made.files(Assembly((3, 1)), plugin=True), root=path)
    exact = made.backbone.to_dtype(torch.float64)
    inputs = inputs_of(made.backbone)
    expected = EagerModel(exact, MODULAR.eager(exact, files)).run(inputs)
    ir.save(MODULAR.bind(path / "any-ratio.onnx", files, made.backbone.info), path / "own.onnx")
    found = OnnxRuntimeRunner(path / "own.onnx").run(inputs)
    for output, array in expected.items():
        assert deviation(found[output], array).relative_frobenius < 2e-5
