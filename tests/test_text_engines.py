"""Engines of models that generate text. They are really built; where one would run, its graph does."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from artefacts import Artefacts
from command_line import call
from host_gpu import HostGpu, OpenGraph
from signed import sign
from test_text_to_text import _inputs, text_bundle, text_recipe  # noqa: F401 (fixtures)

from variator_export import Bundle, UserError
from variator_export.building.compile_engines import compile_engines, merge_engines
from variator_export.building.steps.engines import EngineOrder, engine_step
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import EngineEntry
from variator_export.core.gpu import Gpu
from variator_export.core.parts import DECODER, ENCODER
from variator_export.engines import choice
from variator_export.engines.compatibility import TargetMachine
from variator_export.engines.request import Profile
from variator_export.engines.target import GeneratingSession
from variator_export.engines.tensorrt import decoder, session
from variator_export.recipe.recipe import EngineRecipe, ShapeSet
from variator_export.verification import runs
from variator_export.verification.bundle_verification import store_verification, verify
from variator_export.verification.generation.checks import ALONE, FORCED, GREEDY

TARGET = "tensorrt-rtx"
SETS = {"usual": ShapeSet(batch_size=(1, 2, 8), sequence_length=(1, 16, 64), new_tokens=(8, 24), num_beams=3)}
Compiled = Callable[[str], Path]


@pytest.fixture(scope="module")
def compiled(artefacts: Artefacts, text_bundle: Callable[[str], Bundle]) -> Compiled:  # noqa: F811
    """A bundle with engines of ratio 4 and of every ratio, by the name of its model; not to be changed."""

    def find(name: str) -> Path:
        source = text_bundle(name).path

        def make(folder: Path) -> None:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            compile_engines(
                folder, EngineOrder(EngineRecipe(profiles=SETS), (TARGET,), ("ratio-4", "any-ratio"))
            )

        return artefacts.folder(f"text-engines/{name}", make)

    return find


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """A machine with a GPU, whose engines are the graphs that they were built of; or others, by engine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found, device, others = Gpu("a GPU", "sm89"), HostGpu(), dict[str, Path]()
    for module in (session, decoder, runs):
        monkeypatch.setattr(module, "first_gpu", lambda: found)
    place = TargetMachine("this machine", "sm89", {TARGET: "1.7.1.116"})
    monkeypatch.setattr(choice, "this_machine", lambda: place)
    monkeypatch.setattr(session, "CudaDevice", lambda: device)

    def open_graph(
        bundle: BundleFiles, entry: EngineEntry, sidecar: Mapping[str, Any], **__: object
    ) -> OpenGraph:
        graph = others.get(entry.engine, bundle.graph(bundle.graph_of_engine(entry)))
        profiles = [Profile.model_validate(profile) for profile in sidecar["profiles"]]
        return OpenGraph(str(graph), device, profiles)

    for module in (session, decoder):
        monkeypatch.setattr(module, "open_engine", open_graph)
    return others


def _session(bundle: Bundle, variant: str | None = None, **options: Any) -> GeneratingSession:
    opened = bundle.session(TARGET, variant, allow_unverified=True, **options)
    assert isinstance(opened, GeneratingSession)
    return opened


def _engine(bundle: Bundle, part: str) -> EngineEntry:
    return next(entry for entry in bundle.manifest.engines if entry.part == part)


@pytest.mark.parametrize("name", ["t5-gated-text", "bart-text"])
def test_an_encoder_for_each_ratio_and_one_decoder(compiled: Compiled, name: str, tmp_path: Path) -> None:
    bundle = Bundle.load(compiled(name))
    engines = {Path(entry.engine).name: entry for entry in bundle.manifest.engines}
    assert {n: (e.variant, e.part) for n, e in engines.items()} == {
        "ratio-4_encoder_model.engine": ("ratio-4", ENCODER),
        "any-ratio_encoder_model.engine": ("any-ratio", ENCODER),
        "decoder_with_past_model.engine": ("any-ratio", DECODER),
    }
    (profile,) = bundle.sidecar(engines["decoder_with_past_model.engine"])["profiles"]
    assert profile["new_tokens"] == 24
    assert profile["shapes"]["encoder_attention_mask"] == [[1, 1], [2, 16], [24, 64]], "three beams of 8 rows"
    keys = profile["shapes"]["past_key_values.0.decoder.key"]
    assert [shape[2] for shape in keys] == [0, 7, 23], "nothing before the first token"
    found = json.loads(call("doctor", str(bundle.path), "--format", "json").stdout)["bundle"]["engines"]
    assert {(engine["variant"], engine["part"]) for engine in found} == {
        (entry.variant, entry.part) for entry in engines.values()
    }
    shown = " ".join(call("doctor", str(bundle.path)).stdout.split())
    assert "engine decoder_with_past_model for tensorrt-rtx 1.7.1.116 on portable" in shown

    # A newer version of the package keeps a decoder that may have been verified; another graph does not.
    for changed, only, rebuilt in (
        ("code", "ratio-2", ["ratio-2_encoder_model"]),
        ("graph", "ratio-4", ["decoder_with_past_model"]),
    ):
        folder = tmp_path / changed
        shutil.copytree(bundle.path, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["steps"][engine_step(_engine(bundle, DECODER))][changed] = "other"
        (folder / "manifest.json").write_text(json.dumps(manifest))
        result = compile_engines(folder, EngineOrder(EngineRecipe(profiles=SETS), (TARGET,), (only,)))
        made = [r.name for r in result.steps if r.name.startswith("engine/") and r.action == "made"]
        assert [step.rpartition("/")[2] for step in made] == rebuilt


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["plain", "CUDA graphs"])
@pytest.mark.parametrize("name", ["t5-gated-text", "bart-text"])
def test_engines_generate_the_tokens_of_the_graphs(compiled: Compiled, name: str, cuda_graphs: bool) -> None:
    bundle = Bundle.load(compiled(name))
    graphs, engines = bundle.session(), _session(bundle, cuda_graphs=cuda_graphs)
    assert isinstance(graphs, GeneratingSession)
    one = _session(bundle, "ratio-4", cuda_graphs=cuda_graphs)
    for seed, ratio in enumerate((1, 4, 2, 3)):
        inputs = _inputs(4, 13, seed)
        for settings in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            expected = graphs.generate(inputs, ratio, max_new_tokens=12, **settings)
            opened = (engines, one) if ratio == 4 else (engines,)
            for other in opened:
                found = other.generate(inputs, ratio, max_new_tokens=12, **settings)
                for row, theirs in zip(found.tokens, expected.tokens, strict=True):
                    assert list(map(list, row)) == list(map(list, theirs))
    # Two calls at a time, each with its own encoder outputs.
    first, second = (_inputs(2, 9, seed) for seed in (7, 8))
    streams = [one.stream(inputs, 4, max_new_tokens=6) for inputs in (first, second)]
    steps = list(zip(*streams, strict=True))
    for index, inputs in enumerate((first, second)):
        expected_steps = list(graphs.stream(inputs, 4, max_new_tokens=6))
        assert np.array_equal([step[index] for step in steps], expected_steps)


@pytest.mark.usefixtures("gpu")
def test_what_is_beyond_the_decoders_profile_is_refused_before_it_runs(compiled: Compiled) -> None:
    bundle = Bundle.load(compiled("t5-gated-text"))
    opened = _session(bundle, "ratio-4")
    profile = r"It has usual \(1x1, 2x16, 24x64, up to 24 new tokens\)"
    with pytest.raises(UserError, match=rf"not take 2 rows, 9 input tokens and 25 new tokens\. {profile}"):
        opened.generate(_inputs(2, 9, 0), max_new_tokens=25)
    with pytest.raises(UserError, match=r"not take 28 rows"):
        opened.generate(_inputs(7, 9, 0), max_new_tokens=4, num_beams=4)
    with pytest.raises(UserError, match="No profile of the engine is for the shapes"):
        opened.generate(_inputs(9, 9, 0), max_new_tokens=4)
    assert len(opened.generate(_inputs(8, 64, 0), max_new_tokens=24, num_beams=3).tokens) == 8


def test_profiles_of_text_are_for_models_that_generate(small_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(small_bundle, tmp_path / "small")
    order = EngineOrder(EngineRecipe(profiles=SETS), (TARGET,), ("ratio-2",))
    with pytest.raises(UserError, match="usual has new_tokens or num_beams, and the model generates no text"):
        compile_engines(tmp_path / "small", order)


def test_a_session_needs_the_decoder_verified_too(
    compiled: Compiled, gpu: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(compiled("t5-gated-text"), folder)
    store_verification(verify(folder, [4], target=TARGET))
    Bundle.load(folder).session(TARGET, 4)
    with pytest.raises(UserError, match=r"any-ratio_encoder_model\.engine was built and never verified"):
        Bundle.load(folder).session(TARGET)
    found = verify(folder, target=TARGET)
    store_verification(found)
    assert found.passed, found.failures
    engine = _engine(Bundle.load(folder), DECODER).engine
    checked = {f.question.case for f in found.findings["ratio-4"] if f.question.check == FORCED}
    assert {"8x64", "2x16", "1x1"} <= checked, "the shapes of the profile"
    left = [entry for of_variant in found.left_out.values() for entry in of_variant]
    assert engine not in {entry.graph for entry in left}
    rows = [line for line in call("inspect", str(folder)).stdout.splitlines() if "decoder" in line]
    assert any("verified on" in row for row in rows)
    checks = {f.question.check for f in found.findings["ratio-4"] if f.question.graph == engine}
    assert checks == {FORCED, ALONE, GREEDY}
    Bundle.load(folder).session(TARGET, 4)

    # The same decoder, with one weight of its last layer changed.
    model = ir.load(folder / "decoder_with_past_model.onnx")
    ir.external_data.load_to_model(model)
    weights = [value for value in model.graph.initializers.values() if "layers.1" in str(value.name)] or list(
        model.graph.initializers.values()
    )
    largest = max(weights, key=lambda value: value.const_value.size)  # type: ignore[union-attr]
    largest.const_value = ir.tensor(1.02 * largest.const_value.numpy(), name=largest.name)  # type: ignore[union-attr]
    ir.save(model, tmp_path / "wrong.onnx")
    gpu[engine] = tmp_path / "wrong.onnx"
    found = verify(folder, [4], target=TARGET)
    store_verification(found)
    assert {f.question.graph for f in found.failures} == {engine}
    with pytest.raises(UserError, match=r"decoder_with_past_model\.engine FAILED its verification on a GPU"):
        Bundle.load(folder).session(TARGET, 4)


@pytest.mark.usefixtures("gpu")
def test_each_profile_has_its_own_limits(text_bundle: Callable[[str], Bundle], tmp_path: Path) -> None:  # noqa: F811
    """A short text for many rows, a long one for one: neither is taken for the other's."""
    folder = tmp_path / "bundle"
    shutil.copytree(text_bundle("t5-gated-text").path, folder)
    profiles = {
        "many": ShapeSet(batch_size=(1, 8, 8), sequence_length=(1, 16, 64), new_tokens=(2, 5)),
        "one": ShapeSet(batch_size=(1, 1, 1), sequence_length=(1, 16, 64), new_tokens=(8, 20)),
    }
    order = EngineOrder(EngineRecipe(profiles=profiles), (TARGET,), ("ratio-2",))
    first = compile_engines(folder, order)
    found = verify(folder, [2], target=TARGET)
    assert found.passed, found.failures
    opened = _session(Bundle.load(folder), "ratio-2")
    assert len(opened.generate(_inputs(8, 9, 0), max_new_tokens=5).tokens) == 8
    assert len(opened.generate(_inputs(1, 9, 0), max_new_tokens=20).tokens) == 1
    with pytest.raises(UserError, match="not take 2 rows, 9 input tokens and 6 new tokens"):
        opened.generate(_inputs(2, 9, 0), max_new_tokens=6)

    # Another machine compiled another ratio, and its decoder has other bytes.
    other = tmp_path / "other"
    shutil.copytree(text_bundle("t5-gated-text").path, other)
    compile_engines(other, dataclasses.replace(order, only=("ratio-3",)))
    engine = other / _engine(Bundle.load(other), DECODER).engine
    engine.write_bytes(engine.read_bytes() + b"0")
    sign(other)
    merged = merge_engines(folder, [other])
    assert len(merged.engines) == len(first.engines) + 1
    assert Bundle.load(folder).engines(TARGET, "ratio-3")


@pytest.mark.usefixtures("gpu")
def test_a_failing_decoder_engine_is_a_finding(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(compiled("bart-text"), folder)

    def refuse(*_: Any) -> Any:
        raise UserError("The GPU is full.", "Buy another.")

    monkeypatch.setattr(decoder.DecoderEngine, "run_values", refuse)
    found = verify(folder, [4], target=TARGET)
    failures = {f.problem for f in found.failures}
    assert failures == {"The GPU is full."}
    store_verification(found)
    with pytest.raises(UserError, match=r"decoder_with_past_model\.engine FAILED its verification"):
        Bundle.load(folder).session(TARGET, 4)
