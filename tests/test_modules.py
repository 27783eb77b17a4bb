"""Modules: their files, their training, and bundles with assemblies."""

import copy
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from artefacts import Artefacts
from command_line import call
from conftest import plugin_for
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from signed import sign
from test_assemble import random_modules

from variator_export.building.recipe_build import build
from variator_export.core.assembly import DECODER_STACK, ENCODER_STACK
from variator_export.core.errors import UserError
from variator_export.data.texts import read_texts
from variator_export.model.backbone import Backbone, load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.modular.assembled import copied_layer, layers_of, own_state
from variator_export.model.modular.card import module_card
from variator_export.model.modular.files import load_module_config
from variator_export.model.modular.layout import ModuleConfig, even_groups
from variator_export.model.modular.weights import load_modules, save_modules
from variator_export.model.plugin_file import save_plugin
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe import Recipe
from variator_export.serving.variants import read_variants
from variator_export.sessions import Bundle
from variator_export.training.modular.pretrain import pretrain_modules
from variator_export.training.modular.replacing import ModuleReplacing, check_module_losses
from variator_export.training.modular.settings import ModuleLosses, ModuleShape, Replacing
from variator_export.training.run import Run
from variator_export.training.settings import Optimisation, PassageSettings
from variator_export.verification.bundle_verification import verify

_RECORD = {
    "stage": "pre-training",
    "loss": 0.1,
    "steps": 1,
    "best_step": 1,
    "command": None,
    "terms": None,
    "versions": {},
    "data": [],
    "settings": {
        "losses": {"hidden": 1.0},
        "optimisation": {
            "batch_size": 1, "learning_rate": 1e-3, "schedule": "linear", "seed": 0, "precision": "float32"
        },
    },
}  # fmt: skip
LOSSES = ModuleLosses(hidden=1.0, layers=1.0, attention=1.0)


def _load(folder: Path) -> Backbone:
    return load_backbone(read_backbone_info(resolve_source(str(folder))), 0)


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Path]) -> Path:
    return small_model("bert", 4)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("modules")
    for granularity in (2, 3):
        save_modules(random_modules(_load(model), granularity), folder / f"g{granularity}")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    rng = random.Random(0)
    words = [
        "the",
        "river",
        "runs",
        "past",
        "a",
        "mill",
        "where",
        "old",
        "stones",
        "lie",
        "and",
        "someone",
        "sings",
        "of",
        "rain",
    ]
    path.write_text(". ".join(" ".join(rng.choices(words, k=9)) for _ in range(600)))
    return str(path)


def _train(
    model: Path | Backbone, texts: str, output: Path, steps: int = 24, **options: Any
) -> dict[str, float]:
    result = pretrain_modules(
        model if isinstance(model, Backbone) else _load(model),
        read_texts([texts]),
        Run(output, dtype="float32"),
        shape=ModuleShape(granularities=(2, 3)),
        losses=LOSSES,
        replacing=Replacing(),
        passages=PassageSettings(min_tokens=8, max_tokens=12, held_out=0.1, held_out_passages=16),
        optimisation=Optimisation(
            steps=steps, batch_size=8, learning_rate=1e-3, eval_every=6, warmup_steps=0, **options
        ),
    )
    return dict(result.losses)


# Files.


def test_modules_are_read_as_they_were_written(tmp_path: Path, modules: Path) -> None:
    found = load_modules(modules / "g2")
    assert [str(group.span) for group in found.config.modules] == ["0-1", "2-3"]
    save_modules(found, tmp_path / "copy")
    for name in ("module_config.json", "modules.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (modules / "g2" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "Upgrade"),
        ({"granularity": 1}, "has to be at least 2"),
        ({"modules": []}, "'modules' is empty"),
        ({"modules": [{"first": 0, "last": 1, "like": 2}]}, "it has to be one of them"),
        (
            {"modules": [{"first": 0, "last": 1, "like": 1}, {"first": 1, "last": 2, "like": 2}]},
            "in two modules",
        ),
        ({"modules": [{"first": 3, "last": 4, "like": 4}]}, "not in a stack of 4 layers"),
        ({"stack": "head"}, "stack"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_wrong_configuration_is_refused(
    tmp_path: Path, modules: Path, change: dict[str, Any], words: str
) -> None:
    content = json.loads((modules / "g2/module_config.json").read_text())
    (tmp_path / "module_config.json").write_text(json.dumps(content | change))
    (tmp_path / "modules.safetensors").write_bytes((modules / "g2/modules.safetensors").read_bytes())
    with pytest.raises(UserError) as error:
        load_module_config(tmp_path)
    assert words in str(error.value)


def _broken(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = min(tensors)
    if kind == "NaN":
        tensors[first].view(-1)[0] = torch.nan
    elif kind == "int":
        tensors[first] = tensors[first].to(torch.int32)
    elif kind == "stray":
        tensors["modules.7.x"] = torch.ones(1)
    elif kind == "empty":
        return {name: tensor for name, tensor in tensors.items() if name.startswith("modules.0.")}
    return tensors


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("NaN", "holds 1 values that are NaN or infinite"),
        ("int", "has type torch.int32"),
        ("stray", "has the tensor modules.7.x"),
        ("empty", "has no tensor of module 1"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path: Path, modules: Path, kind: str, words: str) -> None:
    found = load_modules(modules / "g2")
    save_modules(found, tmp_path)
    save_file(_broken(kind, load_file(tmp_path / "modules.safetensors")), tmp_path / "modules.safetensors")
    with pytest.raises(UserError, match=words):
        load_modules(tmp_path)


def test_a_cut_off_file_is_refused(tmp_path: Path, modules: Path) -> None:
    save_modules(load_modules(modules / "g2"), tmp_path)
    path = tmp_path / "modules.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_modules(tmp_path)


@given(st.integers(2, 6), st.integers(2, 24), st.sampled_from(["first", "middle", "last"]))
def test_groups_are_neighbours_from_the_first_layer_on(granularity: int, layers: int, start: str) -> None:
    groups = even_groups(layers, granularity, start)
    assert [group.first for group in groups] == list(range(0, layers - granularity + 1, granularity))
    assert all(group.span.granularity == granularity for group in groups)


# Training.


@given(st.floats(0.05, 1), st.floats(0.05, 1), st.floats(0.05, 1), st.integers(1, 500))
def test_the_probability_rises_from_its_begin_to_its_end(
    one: float, other: float, rise: float, steps: int
) -> None:
    low, high = sorted((one, other))
    replacing = Replacing(begin=low, end=high, rise=rise)
    values = [replacing.probability(step, steps) for step in range(steps)]
    assert values[0] == low
    assert values == sorted(values)
    assert replacing.probability(steps, steps) == pytest.approx(high)


def _replacing(model: Path, replacing: Replacing, steps: int = 100) -> ModuleReplacing:
    backbone = _load(model)
    sets = {}
    for granularity in (2, 3):
        groups = even_groups(4, granularity)
        config = ModuleConfig(
            stack=ENCODER_STACK, granularity=granularity, num_layers=4, hidden_size=32, modules=groups
        )
        sets[f"g{granularity}"] = (config, [copied_layer(backbone, ENCODER_STACK, g) for g in groups])
    return ModuleReplacing(backbone, sets, LOSSES, replacing, steps=steps, seed=0)


def test_every_step_draws_layers_that_follow_each_other(model: Path) -> None:
    module = _replacing(model, Replacing(begin=0.2, end=1.0, rise=1.0), steps=400)
    shares = []
    for step in range(400):
        units = module.draw(step)[ENCODER_STACK]
        assert [layer for span, _ in units for layer in range(span.first, span.last + 1)] == [0, 1, 2, 3]
        assert any(layer is not None for _, layer in units)
        shares.append(sum(span.granularity for span, layer in units if layer is not None) / 4)
        again = module.draw(step)[ENCODER_STACK]
        assert [(str(a), id(b)) for a, b in units] == [(str(a), id(b)) for a, b in again]
    assert np.mean(shares[300:]) > np.mean(shares[:100]) + 0.1


@pytest.mark.parametrize("name", ["bert", "t5-v1.0"])
def test_modules_learn_and_the_backbone_stays(
    tmp_path: Path, small_model: Callable[..., Path], texts: str, name: str
) -> None:
    """T5's first module shares the position bias with the backbone, which must not be trained."""
    backbone = _load(small_model(name, 4))
    before = {key: tensor.clone() for key, tensor in backbone.model.state_dict().items()}
    _train(backbone, texts, tmp_path / "out")
    assert all(torch.equal(before[key], tensor) for key, tensor in backbone.model.state_dict().items())
    found = load_modules(tmp_path / "out/g2")
    group = found.config.modules[0]
    start = own_state(backbone.spec.family, layers_of(backbone, ENCODER_STACK)[group.like])
    assert found.state(0).keys() == start.keys()
    assert any(not torch.equal(tensor, start[key]) for key, tensor in found.state(0).items())
    training = found.config.training
    assert training is not None
    assert training["settings"]["replacing"] == {"begin": 0.5, "end": 0.9, "rise": 0.5}
    assert {"README.md", "loss.svg"} < {path.name for path in (tmp_path / "out/g2").iterdir()}
    assert "enc=2x2" in (tmp_path / "out/g2/README.md").read_text()


def test_a_longer_training_ends_with_a_smaller_loss(tmp_path: Path, model: Path, texts: str) -> None:
    short, long = (_train(model, texts, tmp_path / str(steps), steps) for steps in (1, 48))
    assert all(long[name] < 0.9 * short[name] for name in short)


def test_a_run_that_was_killed_goes_on_and_ends_the_same(
    tmp_path: Path, model: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train(model, texts, tmp_path / "whole")
    forward = ModuleReplacing.forward

    def dies(self: ModuleReplacing, **inputs: Any) -> Any:
        if self.training and int(self.step) == 15:
            raise KeyboardInterrupt
        return forward(self, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(ModuleReplacing, "forward", dies)
        with pytest.raises(KeyboardInterrupt):
            _train(model, texts, tmp_path / "broken")
    _train(model, texts, tmp_path / "broken")
    for name in ("g2", "g3"):
        whole, broken = (load_modules(tmp_path / run / name).tensors for run in ("whole", "broken"))
        assert all(torch.equal(whole[key], broken[key]) for key in whole)


def test_the_attention_term_sees_the_attention(model: Path) -> None:
    module = _replacing(model, Replacing())
    inputs = {"input_ids": torch.arange(5, 11)[None], "attention_mask": torch.ones((1, 6), dtype=torch.int64)}
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    only = ModuleLosses(hidden=0.0, attention=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "weights", only)
        module.eval()
        before = module(**inputs)["metrics"]
        with torch.no_grad():
            module.clipped[0].get_submodule("attention.self.query").weight.mul_(3)
        after = module(**inputs)["metrics"]
    assert before.shape == (1, 2)
    assert not torch.equal(before[:, 0], after[:, 0])
    assert torch.equal(before[:, 1], after[:, 1])


def test_two_processes_train_what_one_trains(tmp_path: Path, model: Path, texts: str) -> None:
    options = ["--text", texts, "--granularity", "2", "--granularity", "3", "--backbone", str(model)]
    options += ["--steps", "8", "--batch-size", "8", "--max-tokens", "12", "--eval-every", "4"]
    options += ["--precision", "float32", "--dtype", "float32", "--loss", "hidden=1", "--loss", "layers=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "variator_export", "train", "modules", *options]
    one = subprocess.run(
        [*program, "--output", str(tmp_path / "one")], capture_output=True, text=True, env=environment
    )
    assert one.returncode == 0, one.stderr
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", *program[2:]]
    two = subprocess.run(
        [*launch, "--output", str(tmp_path / "two")], capture_output=True, text=True, env=environment
    )
    assert two.returncode == 0, two.stderr[-2000:]
    for name in ("g2", "g3"):
        first, second = (load_modules(tmp_path / run / name).tensors for run in ("one", "two"))
        assert all(torch.allclose(first[key], second[key], atol=2e-4) for key in first)


def test_modules_are_adapted_to_a_task(
    tmp_path: Path, modules: Path, small_model: Callable[..., Path]
) -> None:
    data = tmp_path / "task.tsv"
    rows = [f"word {index} of a text\t{index % 3}" for index in range(60)]
    data.write_text("\n".join(["text\tlabel", *rows]) + "\n")
    classifier = small_model("bert-classifier", 4)
    done = call(
        "train", "adapt", "--backbone", str(classifier), "--module", str(modules / "g2"), "--data", str(data),
        "--steps", "4", "--batch-size", "4", "--max-tokens", "12", "--learning-rate", "1e-3",
        "--output", str(tmp_path / "adapted"), "--format", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["modules"]) == {"g2"}
    config = load_module_config(tmp_path / "adapted/g2")
    assert config.training is not None
    assert config.training["stage"] == "adaptation"
    assert config.training["parent"]["name"] == "g2"
    assert config.backbone is not None
    assert config.backbone.weights_sha256 == resolve_source(str(classifier)).weights_sha256


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--granularity", "2"], 2, "There is no text to train on"),
        (["--text", "x"], 2, "There is no granularity"),
        (["--text", "x", "--granularity", "2", "--start", "best"], 2, "start"),
        (
            ["--text", "x", "--granularity", "2", "--replace-begin", "0.9", "--replace-end", "0.5"],
            2,
            "is more than end",
        ),
        (["--text", "x", "--granularity", "2", "--loss", "attenton=1"], 2, "--loss attention=1"),
        (["--text", "TEXT", "--granularity", "7"], 1, "Choose a granularity from 2 to 4"),
    ],
)
def test_wrong_options_of_a_training_are_refused(
    tmp_path: Path, model: Path, texts: str, options: list[str], code: int, words: str
) -> None:
    given_options = [texts if option == "TEXT" else option for option in options]
    done = call(
        "train", "modules", *given_options, "--backbone", str(model), "--output", str(tmp_path / "out")
    )
    assert done.returncode == code
    assert words in done.stderr


# Bundles.


def _recipe(model: Path, modules: Path, *assemblies: Any, **more: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "modular",
            "backbone": {"source": str(model)},
            "plugins": [{"ratio": 2, "initialise": {"seed": 1}}],
            "modules": [{"source": str(modules / name)} for name in ("g2", "g3")],
            "assemblies": assemblies,
            "speed": None,
            **more,
        }
    )


@pytest.fixture(scope="module")
def bundle(artefacts: Artefacts, model: Path, modules: Path) -> Path:
    def make(folder: Path) -> None:
        build(
            _recipe(model, modules, "enc=2x2", "enc=3,1;k=2", {"spec": "enc=2,1,1", "name": "mine"}), folder
        )

    return artefacts.folder("modular-bundle", make)


def test_one_session_runs_every_assembly(bundle: Path) -> None:
    opened = Bundle.load(bundle)
    session = opened.session(threads=1)
    assert session.names == ("ratio-1", "ratio-2", "enc-2x2", "enc-3-1_ratio-2", "mine")
    inputs = {name: np.full((2, 7), 7, np.int64) for name in opened.manifest.backbone.inputs}
    inputs |= {"attention_mask": np.ones((2, 7), np.int64), "token_type_ids": np.zeros((2, 7), np.int64)}
    found = {name: session.run(inputs, name)["last_hidden_state"] for name in session.names}
    for name, array in found.items():
        own = opened.session(variant=name, threads=1).run(inputs)["last_hidden_state"]
        np.testing.assert_allclose(array, own, atol=2e-5)
    assert len({array.tobytes() for array in found.values()}) == len(found)
    # A ratio alone is the original layers.
    np.testing.assert_array_equal(session.run(inputs, 1)["last_hidden_state"], found["ratio-1"])
    np.testing.assert_array_equal(session.run(inputs, 2)["last_hidden_state"], found["ratio-2"])
    assert opened.variant(1).name == "ratio-1"


def test_the_bundle_passes_its_own_verification(bundle: Path) -> None:
    assert verify(bundle).passed


def swap_modules(graph: Path, prefix: str = "g2.encoder.layer") -> None:
    """Let each of two modules read the other's weights: those like layers 1 and 3."""
    model = onnx.load(graph, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}.1."):
            other = tensors[name.replace(f"{prefix}.1.", f"{prefix}.3.")]
            mine, theirs = (list(map(copy.copy, t.external_data)) for t in (tensor, other))
            del tensor.external_data[:], other.external_data[:]
            tensor.external_data.extend(theirs)
            other.external_data.extend(mine)
    onnx.save(model, graph)


@pytest.mark.parametrize("file", ["enc-2x2.onnx", "any-assembly.onnx"])
def test_a_swap_of_two_modules_is_caught_and_named(bundle: Path, tmp_path: Path, file: str) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(bundle, wrong)
    swap_modules(wrong / file)
    sign(wrong)
    result = verify(wrong, ["enc-2x2"], profile_shapes="none", reproduction=tmp_path / "reproduction")
    assert {finding.question.graph for finding in result.failures} == {file}
    (bisection,) = result.bisections
    assert bisection.first is not None
    assert bisection.first.module.startswith("encoder.layer.0-1")
    right = verify(wrong, ["ratio-1"], profile_shapes="none")
    assert right.passed


def test_weights_are_stored_once(bundle: Path, modules: Path) -> None:
    manifest = Bundle.load(bundle).manifest
    stored = {name: e.size_bytes for name, e in manifest.files.items() if name.endswith(".safetensors")}
    own = sum(size for name, size in stored.items() if name.startswith("modules/"))
    given_size = sum((modules / name / "modules.safetensors").stat().st_size for name in ("g2", "g3"))
    assert own == given_size
    assert not any(
        entry.size_bytes > 500_000 for name, entry in manifest.files.items() if name.endswith(".onnx")
    )


def test_a_bundle_is_extended_by_an_assembly(tmp_path: Path, model: Path, modules: Path) -> None:
    folder = tmp_path / "bundle"
    build(_recipe(model, modules, "enc=2x2"), folder)

    def made(assembly: str) -> set[str]:
        result = build(_recipe(model, modules, assembly), folder)
        return {step.name for step in result.steps if step.action == "made"}

    # Its module is in the graph of all assemblies already, so nothing else is verified again.
    assert made("enc=2,1,1") == {"bind/enc-2-1x2", "verify/enc-2-1x2"}
    assert {"assemble", "bind/enc-3-1", "verify/ratio-1"} <= made("enc=3,1")
    assert [v.name for v in Bundle.load(folder).manifest.variants][2:] == ["enc-2-1x2", "enc-2x2", "enc-3-1"]
    assert made("enc=3,1") == set()


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_assemblies_in_other_precisions(tmp_path: Path, model: Path, modules: Path, precision: str) -> None:
    loose = {"min_cosine": -1, "min_agreement": 0}
    recipe = _recipe(model, modules, "enc=2x2", "enc=3,1;k=2", precision=precision, quantization=loose)
    build(recipe, tmp_path / "bundle")
    assert verify(tmp_path / "bundle").passed


def test_modules_have_no_constant_scales(tmp_path: Path, model: Path, modules: Path) -> None:
    with pytest.raises(UserError, match="Modules have no constant scales"):
        build(_recipe(model, modules, "enc=2x2", precision="int8-static"), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("assembly", "words"),
    [
        ("enc=2,1", "adds up to 3 layers; the encoder has 4"),
        ("enc=1,2,1", "no module for the encoder's layers 1-2"),
        ("enc=4", "no module for the encoder's layers 0-3"),
        ("enc=1x4", "has only original layers"),
        ("enc=2x2;dec=1x3", "the decoder, which the backbone does not have"),
        ("enc=2x2;k=4", "asks for the plugin of ratio 4"),
        ({"spec": "enc=2x2", "name": "ratio-2"}, "which means another variant"),
        ({"spec": "enc=2x2", "name": "ratio-8"}, "which means another variant"),
        ({"spec": "enc=2x2", "name": "model"}, "which means another variant"),
        ({"spec": "enc=2x2", "name": "any-assembly"}, "which means another variant"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_trace(
    tmp_path: Path, model: Path, modules: Path, assembly: Any, words: str
) -> None:
    with pytest.raises(UserError) as error:
        build(_recipe(model, modules, assembly), tmp_path / "bundle")
    assert words in str(error.value)
    assert not (tmp_path / "bundle").exists()


def test_modules_of_another_backbone_are_refused(
    tmp_path: Path, modules: Path, small_model: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match="were made for the backbone"):
        build(_recipe(small_model("bert-classifier", 4), modules, "enc=2x2"), tmp_path / "bundle")


def test_a_convolution_between_layers_is_refused(
    tmp_path: Path, modules: Path, small_model: Callable[..., Path]
) -> None:
    folder = tmp_path / "conv"
    shutil.copytree(small_model("deberta-v3", 4), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"conv_kernel_size": 3}))
    with pytest.raises(UserError, match="a convolution after the first layer"):
        build(_recipe(folder, modules, "enc=2x2"), tmp_path / "bundle")


def test_two_modules_for_the_same_layers_are_refused(tmp_path: Path, model: Path, modules: Path) -> None:
    recipe = _recipe(model, modules, "enc=2x2")
    twice = (*recipe.modules, recipe.modules[0].model_copy(update={"name": "other"}))
    with pytest.raises(
        UserError, match="Two folders have a module for the encoder's layers 0-1: g2 and other"
    ):
        build(recipe.model_copy(update={"modules": twice}), tmp_path / "bundle")


def test_a_folder_that_cannot_name_modules_asks_for_a_name(
    tmp_path: Path, model: Path, modules: Path
) -> None:
    shutil.copytree(modules / "g2", tmp_path / "my modules")
    options = ["--backbone", str(model), "--assembly", "2x2", "--no-speed", "--target", "onnxruntime"]
    done = call(
        "build", *options, "--module", str(tmp_path / "my modules"), "--output", str(tmp_path / "out")
    )
    assert done.returncode == 1
    assert "--module NAME=DIR" in done.stderr


def test_other_modules_of_the_same_name_are_judged_again(
    tmp_path: Path, embedding_model: Path, pairs: str
) -> None:
    """The graphs are the same, because they name the file of the modules alone."""
    backbone = _load(embedding_model)
    good = random_modules(backbone, 2)
    save_modules(good, tmp_path / "g2")
    quality = {"data": pairs, "text_column": "a", "pair_column": "b", "label_column": "score", "max_loss": 1}
    recipe = Recipe.model_validate(
        {
            "name": "judged",
            "backbone": {"source": str(embedding_model)},
            "modules": [{"source": str(tmp_path / "g2")}],
            "assemblies": ["enc=2"],
            "quality": quality,
            "speed": None,
        }
    )
    build(recipe, tmp_path / "bundle")
    worse = {name: tensor + 1 for name, tensor in good.tensors.items()}
    save_modules(dataclasses.replace(good, tensors=worse), tmp_path / "g2")
    strict = recipe.model_copy(
        update={"quality": recipe.quality and recipe.quality.model_copy(update={"max_loss": 1.0})}
    )
    result = build(strict, tmp_path / "bundle")
    made = {step.name for step in result.steps if step.action == "made"}
    assert {"modules/g2", "verify/enc-2", "quality"} <= made


def test_kept_modules_are_quantised_again(tmp_path: Path, model: Path, modules: Path) -> None:
    loose = {"min_cosine": -1, "min_agreement": 0}
    folder = tmp_path / "bundle"
    build(_recipe(model, modules, "enc=2x2", precision="int8", quantization=loose), folder)
    other = _recipe(model, modules, precision="int8", quantization={**loose, "float32_modules": ["query"]})
    build(other.model_copy(update={"modules": ()}), folder)
    assert verify(folder, ["enc-2x2"]).passed


def test_assemblies_keep_their_plugin(tmp_path: Path, model: Path, modules: Path) -> None:
    """A second plugin of the ratio may come, and a ratio that is not built leaves out its assemblies."""
    folder = tmp_path / "bundle"
    build(_recipe(model, modules, "enc=2x2;k=2"), folder)
    second = [{"ratio": 2, "name": "second", "initialise": {"seed": 2}}]
    build(_recipe(model, modules, plugins=second), folder)
    found = {v.name: v for v in Bundle.load(folder).manifest.variants}
    assert found["enc-2x2_ratio-2"].plugin is not None
    assert found["enc-2x2_ratio-2"].plugin.folder == "plugins/ratio-2"
    named = {"spec": "enc=2x2;k=2", "name": "other", "plugin": "second"}
    build(_recipe(model, modules, named, plugins=second), folder)
    other = Bundle.load(folder).variant("other").plugin
    assert other is not None
    assert other.folder == "plugins/second"
    with pytest.raises(UserError, match="asks for the plugin of ratio 2; there are ratio-2"):
        build(_recipe(model, modules, {"spec": "enc=2,1,1;k=2"}, plugins=second), folder)
    build(_recipe(model, modules, "enc=2x2", "enc=2x2;k=2", ratios=[1]), tmp_path / "one")
    assert [v.name for v in Bundle.load(tmp_path / "one").manifest.variants] == ["ratio-1", "enc-2x2"]


def test_modules_stay_in_float32_like_the_layer_they_are_like(
    tmp_path: Path, model: Path, modules: Path
) -> None:
    kept = {"min_cosine": -1, "min_agreement": 0, "float32_modules": ["encoder.layer.3"]}
    build(_recipe(model, modules, "enc=2x2", precision="int8", quantization=kept), tmp_path / "bundle")
    stored = load_file(tmp_path / "bundle/modules/g2/quantized.safetensors")
    types = {name: stored[name].dtype for name in sorted(stored) if name.endswith("query.weight")}
    assert list(types.values()) == [torch.int8, torch.float32]


def test_a_ratio_alone_is_not_an_assembly(bundle: Path) -> None:
    session = Bundle.load(bundle).session(variant="enc-2x2", threads=1)
    inputs = {name: np.ones((1, 4), np.int64) for name in Bundle.load(bundle).manifest.backbone.inputs}
    session.run(inputs)
    session.run(inputs, "enc-2x2")
    with pytest.raises(UserError, match="This session runs enc-2x2"):
        session.run(inputs, 1)


def test_the_report_lists_assemblies_and_the_graph_of_all(bundle: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = call("report", str(bundle), "--output", str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "enc-2x2 (enc=2x2)" in text
    assert "any-assembly (every assembly)" in text


def test_policies_choose_by_work_and_loss(bundle: Path) -> None:
    opened = Bundle.load(bundle)
    served = read_variants(opened, allow_unknown_quality=True)
    assert served.all[0].name == "ratio-1"
    assert [v.work for v in served.all[1:]] == sorted((v.work for v in served.all[1:]), reverse=True)
    assert {v.label for v in served.all} == {1, 2, "enc-2x2", "enc-3-1_ratio-2", "mine"}
    assert served.all[served.named("1")[0]].name == "ratio-1"
    assert served.all[served.named("enc-2x2")[0]].work == pytest.approx(0.5)


def test_losses_that_modules_do_not_have_are_refused(small_model: Callable[..., Path]) -> None:
    for term in ("decoder", "logits"):
        weights = ModuleLosses(hidden=0.0, **{term: 1.0})
        with pytest.raises(UserError):
            check_module_losses(_load(small_model("bert", 4)), weights, [ENCODER_STACK])
    with pytest.raises(UserError, match="need a term of the loss that runs the decoder"):
        check_module_losses(_load(small_model("t5-text", 4)), ModuleLosses(attention=1.0), [DECODER_STACK])
    check_module_losses(
        _load(small_model("bert", 4)), ModuleLosses(hidden=0.0, attention=1.0), [ENCODER_STACK]
    )


def test_modules_of_another_stack_are_refused(tmp_path: Path, model: Path, modules: Path) -> None:
    other = load_modules(modules / "g2")
    config = dataclasses.replace(other.config, stack="decoder")
    save_modules(dataclasses.replace(other, config=config), tmp_path / "g2")
    recipe = _recipe(model, modules)
    recipe = recipe.model_copy(
        update={"modules": (recipe.modules[0].model_copy(update={"source": str(tmp_path / "g2")}),)}
    )
    with pytest.raises(UserError, match=r"are for the decoder; the backbone .* has none"):
        build(recipe, tmp_path / "bundle")


def test_the_command_builds_and_inspects_assemblies(tmp_path: Path, model: Path, modules: Path) -> None:
    output = str(tmp_path / "bundle")
    done = call(
        "build", "--backbone", str(model), "--module", str(modules / "g2"), "--assembly", "half=2x2",
        "--target", "onnxruntime", "--no-speed", "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = call("inspect", output)
    assert "modules g2: encoder layers 0-1, 2-3" in shown.stdout
    assert "enc=2x2" in shown.stdout
    wrong = call("build", "--module", str(modules / "g2"), "--assembly", "enc=2;;", "--output", output)
    assert wrong.returncode == 1
    assert "is not one of enc=…, dec=… and k=…" in wrong.stderr


def test_a_plugin_in_an_assembly_is_warned_of_until_it_is_measured(
    tmp_path: Path, embedding_model: Path, pairs: str
) -> None:
    save_modules(random_modules(_load(embedding_model), 2), tmp_path / "g2")
    save_plugin(plugin_for(_load(embedding_model), 2), tmp_path / "ratio-2")
    output = str(tmp_path / "bundle")
    command = [
        "build", "--backbone", str(embedding_model), "--module", str(tmp_path / "g2"),
        "--assembly", "enc=2;k=2",
        "--plugin", str(tmp_path / "ratio-2"), "--target", "onnxruntime", "--no-speed", "--output", output,
    ]  # fmt: skip
    done = call(*command)
    assert done.returncode == 0, done.stderr
    assert "enc-2_ratio-2 (not evaluated)" in done.stderr.replace("\n", " ")
    assert f"variator-export evaluate {output}" in done.stderr.replace("\n", " ")
    columns = ["--text-column", "a", "--pair-column", "b", "--label-column", "score", "--data", pairs]
    measured = call("evaluate", output, *columns, "--format", "json")
    assert measured.returncode == 0, measured.stderr
    again = json.loads(call(*command, "--format", "json").stdout)
    assert isinstance(again["plugins_of_assemblies"]["enc-2_ratio-2"], float)


def test_layers_are_found_in_the_model(model: Path) -> None:
    assert len(layers_of(_load(model), ENCODER_STACK)) == 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    rows = [f"text {index} of a river\tanother text {index % 7}\t{index % 5}" for index in range(30)]
    path.write_text("\n".join(["a\tb\tscore", *rows]) + "\n")
    return str(path)


def test_any_assembly_of_modules_is_evaluated(tmp_path: Path, embedding_model: Path, pairs: str) -> None:
    backbone = _load(embedding_model)
    assert backbone.info.size.num_layers == 2
    folder = tmp_path / "g2"
    modules = random_modules(backbone, 2)
    config = dataclasses.replace(modules.config, training=_RECORD)
    save_modules(dataclasses.replace(modules, config=config), folder)
    (folder / "README.md").write_text(module_card(config))
    columns = ["--text-column", "a", "--pair-column", "b", "--label-column", "score", "--data", pairs]
    done = call(
        "evaluate", str(folder), "--backbone", str(embedding_model), *columns, "--card", "--format", "json"
    )
    assert done.returncode == 0, done.stderr
    assert {row["variant"] for row in json.loads(done.stdout)["rows"]} == {"ratio-1", "enc-2"}
    assert "| enc-2 |" in (folder / "README.md").read_text()
    wrong = call("evaluate", str(folder), "--backbone", str(embedding_model), *columns, "--assembly", "enc=3")
    assert wrong.returncode == 1
    assert "adds up to 3 layers; the encoder has 2" in wrong.stderr


def test_a_bundle_is_evaluated_with_its_own_assemblies(bundle: Path, pairs: str) -> None:
    done = call("evaluate", str(bundle), "--data", pairs, "--text-column", "a", "--assembly", "enc=2x2")
    assert done.returncode == 1
    assert "is a bundle, which has its own assemblies" in done.stderr
