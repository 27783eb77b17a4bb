"""Assemblies with modules in the decoder, of models that generate text."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from artefacts import Artefacts
from command_line import call
from conftest import TEXT_MODELS, VOCAB_SIZE
from signed import sign
from stored_traces import Trace
from test_assemble import inputs_of, random_modules
from test_modules import swap_modules

from variator_export.building.recipe_build import build
from variator_export.bundle.manifest import read_manifest
from variator_export.bundle.variant_files import VariantFiles
from variator_export.core.assembly import DECODER_STACK, Assembly, possible_spans
from variator_export.core.encoder_size import DecoderSize
from variator_export.core.errors import UserError
from variator_export.core.parts import DECODER, ENCODER
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.engines.eager import EagerModel
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.engines.target import GeneratingSession
from variator_export.graph.assemblies.variant import assemble_decoder
from variator_export.model.backbone import Backbone, load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.methods import work_of
from variator_export.model.methods.modular import MODULAR
from variator_export.model.modular.assembled import layers_of, own_state
from variator_export.model.modular.weights import load_modules, save_modules
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe import Recipe
from variator_export.sessions import Bundle
from variator_export.training.modular.adapt import adapt_modules
from variator_export.training.modular.pretrain import default_losses
from variator_export.training.modular.settings import ModuleShape, Replacing
from variator_export.training.results import TrainedFolders
from variator_export.training.run import Run
from variator_export.training.settings import Optimisation
from variator_export.verification.bundle_verification import Verification, verify
from variator_export.verification.generation.decoder import RunnerDecoder
from variator_export.verification.judging.compare import deviation

_LAYERS = 3


class TracedText:
    """A traced model that generates text, with modules for groups of its encoder and decoder."""

    def __init__(self, backbone: Backbone, folder: Path, trace: Trace) -> None:
        self.backbone, self.folder = backbone, folder
        for part, model in trace(backbone, folder, "weights.safetensors").items():
            ir.save(model, self.graph(part))
        self.sets = {
            "enc-2": random_modules(backbone, 2),
            **{f"dec-{g}": random_modules(backbone, g, DECODER_STACK) for g in (2, 3)},
        }
        for name, modules in self.sets.items():
            save_modules(modules, folder / "modules" / name)
        spans = {
            g.span for m in self.sets.values() if m.config.stack == DECODER_STACK for g in m.config.modules
        }
        assert backbone.info.decoder_size is not None
        layers = backbone.info.decoder_size.num_layers
        self.decoders = [tuple(s.granularity for s in found) for found in possible_spans(layers, spans)]

    def graph(self, part: str) -> Path:
        return self.folder / f"{'any-ratio_' if part == ENCODER else ''}{part}.onnx"

    def size(self, decoder: tuple[int, ...]) -> DecoderSize:
        assert self.backbone.info.decoder_size is not None
        return dataclasses.replace(self.backbone.info.decoder_size, num_layers=len(decoder))

    def files(self, assembly: Assembly) -> VariantFiles:
        return VariantFiles(self.folder, None, assembly, tuple(f"modules/{name}" for name in self.sets))


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory, load_model: Callable[..., Backbone], trace: Trace
) -> Callable[[str], TracedText]:
    made: dict[str, TracedText] = {}

    def get(name: str) -> TracedText:
        if name not in made:
            made[name] = TracedText(load_model(name, _LAYERS), tmp_path_factory.mktemp(name), trace)
        return made[name]

    return get


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_every_decoder_computes_what_eager_pytorch_computes(
    name: str, traced: Callable[[str], TracedText]
) -> None:
    made = traced(name)
    backbone, info = made.backbone, made.backbone.info
    inputs = inputs_of(backbone)
    exact = backbone.to_dtype(torch.float64)
    tokens = np.random.default_rng(1).integers(5, VOCAB_SIZE, (2, 5))
    for decoder in made.decoders:
        assembly = Assembly((2, 1), decoder)
        files = made.files(assembly)
        eager = EagerModel(exact, MODULAR.eager(exact, files))
        paths = [made.folder / f"{assembly.name}_{part}.onnx" for part in (ENCODER, DECODER)]
        ir.save(MODULAR.bind(made.graph(ENCODER), files, info), paths[0])
        ir.save(assemble_decoder(made.graph(DECODER), files, info), paths[1])
        encoder, step = (OnnxRuntimeRunner(path) for path in paths)
        states = encoder.run(inputs)
        expected = eager.run(inputs)
        assert set(states) == set(expected)
        assert len(states) == 1 + 2 * len(decoder)
        for output, array in expected.items():
            assert deviation(states[output], array).relative_frobenius < 2e-5, (assembly, output)
        call = RunnerDecoder(step, made.size(decoder), inputs["attention_mask"], states)
        found = np.stack([call.step(column) for column in tokens.T], axis=1)
        error = deviation(found, eager.scores(inputs, tokens))
        assert error.relative_frobenius < 2e-5, (assembly, error)


@pytest.fixture(scope="module")
def text_bundle(
    artefacts: Artefacts, small_model: Callable[..., Path], load_model: Callable[..., Backbone]
) -> Path:
    model, backbone = small_model("t5-text", 4), load_model("t5-text", 4)

    def make(folder: Path) -> None:
        sources = folder.parent / "text-modules"
        save_modules(random_modules(backbone, 2), sources / "enc-g2")
        for granularity in (2, 3):
            save_modules(
                random_modules(backbone, granularity, DECODER_STACK), sources / f"dec-g{granularity}"
            )
        recipe = {
            "name": "text",
            "backbone": {"source": str(model)},
            "plugins": [{"ratio": 2, "initialise": {"seed": 1}}],
            "modules": [{"source": str(sources / name)} for name in ("enc-g2", "dec-g2", "dec-g3")],
            "assemblies": ["enc=2x2", "dec=2,2,1", "enc=2,1,1;dec=3,1,1;k=2", "enc=2x2;dec=2,2,1"],
            "speed": None,
        }
        build(Recipe.model_validate(recipe), folder)

    return artefacts.folder("text-bundle-modular", make)


def test_decoders_are_shared_and_described(text_bundle: Path) -> None:
    manifest = read_manifest(text_bundle)
    decoders = {variant.name: variant.decoder_graph for variant in manifest.variants}
    assert decoders["ratio-1"] == decoders["ratio-2"] == decoders["enc-2x2"] == f"{DECODER}.onnx"
    assert decoders["dec-2x2-1"] == decoders["enc-2x2_dec-2x2-1"] == f"dec-2x2-1_{DECODER}.onnx"
    for variant in manifest.variants:
        described = manifest.backbone.decoder_part(variant.assembly)
        graph = ir.load(text_bundle / variant.decoder_graph).graph
        assert {str(value.name) for value in graph.inputs} == set(described.input_names)
        assert [str(value.name) for value in graph.outputs] == list(described.output_names)
    modules = {manifest.modules[name].stack for name in ("enc-g2", "dec-g2")}
    assert modules == {"encoder", "decoder"}


def test_one_session_generates_with_every_assembly(text_bundle: Path) -> None:
    opened = Bundle.load(text_bundle)
    shared = opened.session(threads=1)
    inputs = {"input_ids": np.arange(5, 13)[None], "attention_mask": np.ones((1, 8), np.int64)}
    found = {}
    for variant in opened.manifest.variants:
        own = opened.session(variant=variant.name)
        assert isinstance(shared, GeneratingSession)
        assert isinstance(own, GeneratingSession)
        tokens = [
            session.generate(inputs, variant.name, max_new_tokens=8).tokens[0][0].tolist()
            for session in (shared, own)
        ]
        assert tokens[0] == tokens[1]
        outputs = [session.run(inputs, variant.name) for session in (shared, own)]
        assert {name: a.shape for name, a in outputs[0].items()} == {
            n: a.shape for n, a in outputs[1].items()
        }
        found[variant.name] = str(tokens[0]) + str(outputs[0]["present.0.encoder.key"].sum())
    assert len(set(found.values())) == len(opened.manifest.variants)


def test_a_finished_bundle_is_verified(text_bundle: Path) -> None:
    found = verify(text_bundle)
    assert found.passed
    ran = {f.question.graph for f in found.findings["enc-2x2_dec-2x2-1"]}
    assert ran == {
        f"enc-2x2_dec-2x2-1_{ENCODER}.onnx",
        f"any-assembly_{ENCODER}.onnx",
        f"dec-2x2-1_{DECODER}.onnx",
    }


@pytest.mark.parametrize("file", [f"dec-2x2-1_{DECODER}.onnx", f"dec-2x2-1_{ENCODER}.onnx"])
def test_a_swap_of_two_modules_of_the_decoder_is_caught_and_named(
    text_bundle: Path, tmp_path: Path, file: str
) -> None:
    result = _verified_with_a_swap(text_bundle, tmp_path, file)
    bisection = next(b for b in result.bisections if b.first is not None)
    assert bisection.first is not None
    assert bisection.first.module.startswith("decoder.block.0-1")


def test_a_swap_in_the_graph_of_all_assemblies_is_caught(text_bundle: Path, tmp_path: Path) -> None:
    """Its branches have no single module of eager PyTorch, but the outputs are named."""
    result = _verified_with_a_swap(text_bundle, tmp_path, file := f"any-assembly_{ENCODER}.onnx")
    wrong = {f.question.output for f in result.failures if f.question.graph == file}
    assert wrong == {f"present.{i}.encoder.{kind}" for i in (0, 1) for kind in ("key", "value")}


def _verified_with_a_swap(bundle: Path, folder: Path, file: str) -> Verification:
    wrong = folder / "wrong"
    shutil.copytree(bundle, wrong)
    swap_modules(wrong / file, "dec-g2.decoder.block")
    sign(wrong)
    return verify(wrong, ["dec-2x2-1"], profile_shapes="none", reproduction=folder / "reproduction")


def test_the_default_variant_has_the_original_decoder(text_bundle: Path, tmp_path: Path) -> None:
    recipe = dict(read_manifest(text_bundle).recipe)
    recipe["graphs"] = {**recipe["graphs"], "default_variant": "dec-2x2-1"}
    with pytest.raises(UserError, match="whose decoder has modules"):
        build(Recipe.model_validate(recipe), tmp_path / "bundle")


def test_work_counts_the_decoder(text_bundle: Path) -> None:
    manifest = read_manifest(text_bundle)
    work = {variant.name: work_of(variant, manifest.backbone) for variant in manifest.variants}
    assert work["enc-2x2_dec-2x2-1"] < min(work["enc-2x2"], work["dec-2x2-1"])
    assert max(work["enc-2x2"], work["dec-2x2-1"]) < work["ratio-1"]


# Training.


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("table") / "table.jsonl"
    rows = [{"text": f"the river number {i}", "summary": f"river {i % 7}"} for i in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _train(backbone: Backbone, table: str, output: Path, steps: int, shape: ModuleShape) -> TrainedFolders:
    examples = read_examples(table, Columns("text", None, "summary"))
    return adapt_modules(
        backbone,
        shape,
        examples,
        examples,
        Run(output, dtype="float32"),
        losses=default_losses(backbone, with_decoder=True),
        replacing=Replacing(),
        optimisation=Optimisation(
            steps=steps, batch_size=8, learning_rate=3e-3, precision="float32", eval_every=steps
        ),
    )


@pytest.mark.parametrize("name", ["t5-text", "bart-text"])
def test_modules_of_both_stacks_learn_and_the_backbone_stays(
    name: str, small_model: Callable[..., Path], table: str, tmp_path: Path
) -> None:
    backbone = load_backbone(read_backbone_info(resolve_source(str(small_model(name, 4)))), 0)
    before = {key: tensor.clone() for key, tensor in backbone.model.state_dict().items()}
    shape = ModuleShape(granularities=(2,), decoder_granularities=(2, 3))
    short, long = (_train(backbone, table, tmp_path / str(n), n, shape).losses for n in (1, 40))
    assert set(long) == {"g2", "decoder-g2", "decoder-g3"}
    assert all(long[key] < 0.9 * short[key] for key in long)
    assert all(torch.equal(before[key], tensor) for key, tensor in backbone.model.state_dict().items())
    found = load_modules(tmp_path / "40/decoder-g2")
    assert found.config.stack == DECODER_STACK
    start = own_state(backbone.spec.family, layers_of(backbone, DECODER_STACK)[found.config.modules[0].like])
    assert found.state(0).keys() == start.keys()
    card = (tmp_path / "40/decoder-g2/README.md").read_text()
    assert "for the decoder of the backbone" in card
    assert "--assembly dec=2x2" in card


def test_modules_of_mbart_are_for_its_encoder(
    small_model: Callable[..., Path], table: str, tmp_path: Path
) -> None:
    """Its target texts need the code of a language; its pad token may be 1, as the checkpoints have it."""
    backbone = load_backbone(read_backbone_info(resolve_source(str(small_model("mbart-text", 4)))), 1)
    with pytest.raises(UserError, match="need the code of their language"):
        _train(backbone, table, tmp_path / "both", 1, ModuleShape(decoder_granularities=(2,)))
    examples = read_examples(table, Columns("text", None, None))
    done = adapt_modules(
        backbone,
        ModuleShape(granularities=(2,)),
        examples,
        examples,
        Run(tmp_path / "encoder", dtype="float32"),
        losses=default_losses(backbone, of_task=True),
        replacing=Replacing(),
        optimisation=Optimisation(
            steps=1, batch_size=8, learning_rate=1e-3, precision="float32", eval_every=1
        ),
    )
    assert set(done.losses) == {"g2"}


def test_what_the_training_of_decoders_lacks_is_refused(
    small_model: Callable[..., Path], table: str, tmp_path: Path
) -> None:
    options = ["--decoder-granularity", "2", "--held-out", "0.2", "--output", str(tmp_path / "out")]
    text, bert = str(small_model("t5-text", 4)), str(small_model("bert", 4))
    data = ["--data", table, "--label-column", "summary"]
    for given, words in (
        ([*data, "--validation", table, "--backbone", bert], "has no decoder to train modules for"),
        (["--data", table, "--backbone", text], "need a term of the loss that runs the decoder"),
        ([*data, "--backbone", text, "--text", table], "were both given"),
        (
            ["--text", table, "--validation", table, "--backbone", text],
            "--validation does not go with --text",
        ),
        ([*data, "--corruption", "0.1", "--backbone", text], "--corruption does not go with --data"),
        (["--text", table, "--backbone", str(small_model("bart-text", 4))], "Train them on a table"),
        ([*data, "--backbone", text, "--loss", "hidden=1"], "need a term of the loss that runs the decoder"),
    ):
        done = call("train", "modules", *given, *options)
        assert done.returncode in (1, 2)
        assert words in done.stderr.replace("\n", " ")


def test_an_added_plugin_cannot_take_the_name_of_an_assembly(text_bundle: Path) -> None:
    session = Bundle.load(text_bundle).session(threads=1)
    with pytest.raises(UserError, match="is an assembly; an added plugin runs with the original layers"):
        session.add_plugin("dec-2x2-1", text_bundle / "plugins/ratio-2")


def test_an_encoder_is_assembled_before_a_decoder_of_one_layer(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The encoder's graph has the projections of that layer, and does not run it."""
    short = tmp_path / "model"
    shutil.copytree(small_model("bart-text", 2), short)
    model: Any = transformers.BartForConditionalGeneration.from_pretrained(short)
    model.model.decoder.layers = model.model.decoder.layers[:1]
    model.config.decoder_layers = 1
    model.save_pretrained(short)
    backbone = load_backbone(read_backbone_info(resolve_source(str(short))), 0)
    save_modules(random_modules(backbone, 2), tmp_path / "g2")
    recipe = {
        "name": "short",
        "backbone": {"source": str(short)},
        "modules": [{"source": str(tmp_path / "g2")}],
        "strategies": [{"speedup": 1.0001, "name": "fast", "sequence_length": 32}],
        "speed": None,
    }
    build(Recipe.model_validate(recipe), tmp_path / "bundle")
    assert {v.assembly_spec for v in read_manifest(tmp_path / "bundle").variants} == {None, "enc=2"}
