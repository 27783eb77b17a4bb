"""Sessions: every ratio from one session, without torch or transformers."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import BLOCK, plugin_for

from variator_export import Bundle, UserError, build
from variator_export.engines.onnxruntime.graph import IoBindingRunner
from variator_export.engines.onnxruntime.providers import PROVIDERS
from variator_export.model.backbone import load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.methods import method_of
from variator_export.model.plugin_file import save_plugin
from variator_export.model.plugin_layout import Plugin
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe import Recipe


def _inputs(bundle: Bundle, *texts: str) -> dict[str, np.ndarray]:
    backbone = bundle.manifest.backbone
    return bundle.text_encoder().encode(texts, backbone.inputs, backbone.max_length)


def test_one_session_changes_its_ratio_from_call_to_call(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    session = bundle.session(target="onnxruntime")
    assert session.ratios == (1, 2, 3, 4)
    inputs = _inputs(bundle, "The ferry leaves at seven.", "Yes.")
    own = {k: bundle.session(variant=k).run(inputs)["last_hidden_state"] for k in session.ratios}
    for ratio in (4, 1, 2, 4, 3, 1, 2):
        found = session.run(inputs, ratio=ratio)["last_hidden_state"]
        np.testing.assert_allclose(found, own[ratio], atol=1e-5)
    assert np.abs(own[4] - own[1]).max() > 1e-3, "the ratios differ, or this shows nothing"


def test_sessions_need_neither_torch_nor_transformers(small_bundle: Path) -> None:
    code = BLOCK + textwrap.dedent(f"""
        from variator_export import Bundle
        bundle = Bundle.load({str(small_bundle)!r})
        session = bundle.session(target="onnxruntime")
        backbone = bundle.manifest.backbone
        inputs = bundle.text_encoder().encode(["Yes."], backbone.inputs, backbone.max_length)
        print([session.run(inputs, ratio=k)["last_hidden_state"].shape for k in session.ratios])
    """)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str([(1, 4, 32)] * 4)


def test_commands_that_use_a_bundle_need_neither_torch_nor_transformers(small_bundle: Path) -> None:
    for command in (
        ["run", str(small_bundle), "--ratio", "2", "--text", "Yes.", "--format", "json"],
        ["inspect", str(small_bundle), "--format", "json"],
    ):
        code = BLOCK + f"sys.argv[1:] = {command!r}\nfrom variator_export.cli.main import main\nmain()"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        json.loads(result.stdout)


def test_what_does_not_fit_is_named(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    session = bundle.session()
    good = _inputs(bundle, "Yes.")
    for inputs, words in (
        ({"input_ids": good["input_ids"]}, "the model accepts input_ids, attention_mask, token_type_ids"),
        ({**good, "position_ids": good["input_ids"]}, "position_ids"),
        ({**good, "attention_mask": good["attention_mask"][:, :2]}, "the shapes"),
        ({name: array[:, :0] for name, array in good.items()}, "the shapes"),
        ({name: array.astype(np.float32) for name, array in good.items()}, "the types"),
        ({name: np.zeros((1, 65), np.int64) for name in good}, "have 65 tokens; the model's limit is 64"),
        ({**good, "input_ids": -good["input_ids"]}, "holds negative numbers"),
        ({**good, "input_ids": good["input_ids"] + 10**6}, "ONNX Runtime failed on inputs of the shapes"),
    ):
        with pytest.raises(UserError, match=words):
            session.run(inputs)
    with pytest.raises(UserError, match="has no plugin of 8: ratio-1"):
        session.run(good, ratio=8)
    with pytest.raises(UserError, match=r"This session runs ratio-2 \(ratio 2\), not 4"):
        bundle.session(variant=2).run(good, ratio=4)
    with pytest.raises(UserError, match="There is no target 'openvin'; there are onnxruntime, "):
        bundle.session("openvin")


def test_a_session_outlives_the_bundle_it_was_opened_from(bundle_copy: Path) -> None:
    bundle = Bundle.load(bundle_copy)
    session, inputs = bundle.session(), _inputs(bundle, "Yes.")
    bundle_copy.rename(bundle_copy.parent / "gone")
    for ratio in session.ratios:
        assert session.run(inputs, ratio=ratio)["last_hidden_state"].shape == (1, 4, 32)


def test_a_bundle_that_was_published_again_meanwhile_is_not_mixed(bundle_copy: Path) -> None:
    bundle = Bundle.load(bundle_copy)
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["made_by"]["code"] = "another"
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was published again while it was being opened"):
        bundle.session()


def test_32_bit_integers_are_taken(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    narrow = {name: array.astype(np.int32) for name, array in _inputs(bundle, "Yes.").items()}
    assert bundle.session().run(narrow, ratio=2)["last_hidden_state"].dtype == np.float32


def test_plugins_of_several_tasks_in_one_session(
    embedding_bundle: Path, embedding_model: Path, tmp_path: Path
) -> None:
    """A plugin that is added runs as a bundle built of it does, and may take the place of another."""
    backbone = load_backbone(read_backbone_info(resolve_source(str(embedding_model))), 0)
    tuned = plugin_for(backbone, 4)
    changed = {name: array * 0.5 for name, array in tuned.tensors.items()}
    save_plugin(Plugin(tuned.config, changed), tmp_path / "legal")
    save_plugin(plugin_for(backbone, 8), tmp_path / "eight")
    bundle = Bundle.load(embedding_bundle)
    session, inputs = bundle.session(), _inputs(bundle, "The ferry leaves at seven.", "Yes.")
    plain = session.run(inputs, ratio=4)["sentence_embedding"]
    session.add_plugin("legal", tmp_path / "legal")
    session.add_plugin("eight", tmp_path / "eight")
    assert session.names == ("ratio-1", "ratio-2", "ratio-4", "legal", "eight")
    assert session.ratios == (1, 2, 4, 8)

    recipe = {
        "name": "tasks",
        "backbone": {"source": str(embedding_model)},
        "plugins": [
            {"name": "legal", "source": str(tmp_path / "legal")},
            {"source": str(tmp_path / "eight")},
        ],
        "speed": None,
    }
    built = Bundle.load(build(Recipe.model_validate(recipe), tmp_path / "built").bundle)
    for name, variant in (("legal", "legal"), ("eight", "ratio-8"), (8, "ratio-8")):
        expected = built.session(variant=variant).run(inputs)["sentence_embedding"]
        np.testing.assert_allclose(session.run(inputs, ratio=name)["sentence_embedding"], expected, atol=1e-5)
    assert np.abs(session.run(inputs, ratio="legal")["sentence_embedding"] - plain).max() > 1e-3
    np.testing.assert_array_equal(session.run(inputs, ratio="ratio-4")["sentence_embedding"], plain)
    np.testing.assert_array_equal(session.run(inputs, ratio=4)["sentence_embedding"], plain)

    session.add_plugin("ratio-4", tmp_path / "legal")
    swapped = session.run(inputs, ratio="ratio-4")["sentence_embedding"]
    np.testing.assert_array_equal(swapped, session.run(inputs, ratio="legal")["sentence_embedding"])


def test_a_plugin_that_does_not_fit_leaves_the_session_as_it_was(
    small_bundle: Path, embedding_plugins: dict[int, Path], tmp_path: Path
) -> None:
    bundle = Bundle.load(small_bundle)
    session = bundle.session()
    broken = tmp_path / "broken"
    shutil.copytree(embedding_plugins[2], broken)
    config = json.loads((broken / "plugin_config.json").read_text())
    config["backbone"]["weights_sha256"] = "0" * 64
    (broken / "plugin_config.json").write_text(json.dumps(config))
    for source, words in (
        ("recipes:minilm/ratio-4", "has the hidden size 384; the backbone .* has 32"),
        (broken, "was made for the backbone test with weights of sha256 0{64}"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            session.add_plugin("new", source)
    for name in ("", "../x", 4, None):
        with pytest.raises(UserError, match="is not a valid plugin name"):
            session.add_plugin(name, small_bundle / "plugins" / "ratio-2")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"ratio-3 has the ratio 3; the plugin .* has 2"):
        session.add_plugin("ratio-3", small_bundle / "plugins" / "ratio-2")
    assert session.names == ("ratio-1", "ratio-2", "ratio-3", "ratio-4")


def test_a_session_of_one_variant_takes_no_other_plugin(small_bundle: Path) -> None:
    session = Bundle.load(small_bundle).session(variant=2)
    with pytest.raises(UserError, match="runs ratio-2 alone and accepts no other plugin") as error:
        session.add_plugin("mine", "anywhere")
    assert "leave out `variant`" in str(error.value)
    assert session.names == ("ratio-2",)


@pytest.mark.parametrize(
    ("variable", "asked", "used"), [("3", None, 3), ("3", 2, 2), ("", None, 0), ("many", None, 0)]
)
def test_sessions_use_the_threads_that_the_environment_allots(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, variable: str, asked: int | None, used: int
) -> None:
    opened = []
    real = onnxruntime.InferenceSession

    def remember(model: object, options: onnxruntime.SessionOptions, *rest: object, **more: object) -> object:
        opened.append(options.intra_op_num_threads)
        return real(model, options, *rest, **more)

    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(onnxruntime, "InferenceSession", remember)
    Bundle.load(small_bundle).session(variant=2, threads=asked)
    assert opened == [used], "0 is ONNX Runtime's word for every core"


def test_a_provider_that_is_not_there_fails_instead_of_running_on_the_cpu(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    for target, name in (
        ("onnxruntime-cuda", "CUDAExecutionProvider"),
        ("onnxruntime-tensorrt", "TensorrtExecutionProvider"),
        ("onnxruntime-tensorrt-rtx", "NvTensorRTRTXExecutionProvider"),
    ):
        with pytest.raises(UserError, match=f"The installed ONNX Runtime has no {name}; it has") as raised:
            bundle.session(target)
        wanted = "pip install onnxruntime-ep-nv-tensorrt-rtx" if "rtx" in target else "onnxruntime-gpu"
        assert wanted in str(raised.value.hint)


def test_a_provider_that_cannot_start_is_not_replaced_by_the_cpu(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As onnxruntime-gpu does without CUDA libraries: it logs, and takes the CPU."""
    available = [provider.name for provider in PROVIDERS.values()]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    real = onnxruntime.InferenceSession

    def falls_back(graph: str, options: object, providers: list[object], **more: object) -> object:
        assert providers == [("CUDAExecutionProvider", {"use_tf32": "0"})]
        return real(graph, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    for variant in (None, 2):
        with pytest.raises(UserError, match="cannot start it here, and would run on CPUExecutionProvider"):
            Bundle.load(small_bundle).session("onnxruntime-cuda", variant)


@pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason="ONNX Runtime tells where nodes run since 1.24",
)
def test_products_that_a_provider_leaves_to_the_cpu_are_refused(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What TensorRT does not take runs on CUDA; ONNX Runtime gives the CPU the rest, and only logs that."""
    available = [provider.name for provider in PROVIDERS.values()]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    real = onnxruntime.InferenceSession
    asked: list[object] = []

    def places_on_the_cpu(graph: str, options: object, providers: list[object], **more: object) -> object:
        asked.append(providers)
        session = real(graph, options, providers=["CPUExecutionProvider"], **more)
        monkeypatch.setattr(session, "get_providers", lambda: [providers[0][0]])  # type: ignore[index]
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", places_on_the_cpu)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for target in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
        with pytest.raises(UserError, match=r"leaves \d+ products of this graph to the CPU \(.*MatMul"):
            Bundle.load(small_bundle).session(target, 2)
    cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})
    assert asked[0] == [cuda]
    assert asked[1][1:] == [cuda]  # type: ignore[index]
    name, options = asked[1][0]  # type: ignore[index]
    assert name == "TensorrtExecutionProvider"
    names = Bundle.load(small_bundle).manifest.backbone.inputs
    for end, shape in (("min", "1x1"), ("opt", "8x64"), ("max", "32x64")):
        assert options.pop(f"trt_profile_{end}_shapes") == ",".join(f"{own}:{shape}" for own in names)
    folder = options["trt_engine_cache_path"]
    assert Path(folder).is_relative_to(tmp_path)
    assert Path(folder).is_dir()
    assert options == {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }
    placed = [("CPUExecutionProvider", "Shape"), ("CUDAExecutionProvider", "FusedMatMul")]
    PROVIDERS["onnxruntime-cuda"].require_products(placed)


def test_bound_inputs_and_outputs_give_the_same(small_bundle: Path) -> None:
    """As on a GPU, whose tensors are bound; the CPU can bind too."""
    bundle = Bundle.load(small_bundle)
    inputs = _inputs(bundle, "The ferry leaves at seven.", "Yes.")
    graph = IoBindingRunner(bundle.graph("any-ratio.onnx"), PROVIDERS["onnxruntime"], bind=True)
    session = bundle.session()
    for ratio in (4, 1, 2):
        uploaded = graph.upload(
            method_of(bundle.variant(ratio)).inputs_of(
                bundle, bundle.variant(ratio), bundle.manifest.any_ratio_graph
            )
        )
        for _ in range(2):
            found = graph.run(inputs, uploaded, graph.outputs)
            for name, expected in session.run(inputs, ratio=ratio).items():
                np.testing.assert_array_equal(found[name], expected)
                (only,) = graph.run(inputs, uploaded, [name]).items()
                np.testing.assert_array_equal(only[1], expected)
    with pytest.raises(UserError, match="ONNX Runtime failed on inputs of the shapes"):
        graph.run({**inputs, "input_ids": inputs["input_ids"] + 10**6}, uploaded, graph.outputs)


@pytest.mark.parametrize("variant", [None, 4])
def test_a_caller_chooses_outputs(embedding_bundle: Path, variant: int | None) -> None:
    bundle = Bundle.load(embedding_bundle)
    with pytest.raises(UserError, match="There is no specialization 'egaer'"):
        bundle.session(specialization="egaer")  # type: ignore[arg-type]
    session = bundle.session(variant=variant)
    inputs = _inputs(bundle, "The ferry leaves at seven.", "Yes.")
    everything = session.run(inputs)
    assert len(everything) == 2
    for names in (list(everything), list(everything)[::-1], list(everything)[1:], []):
        found = session.run(inputs, outputs=names)
        assert list(found) == names
        for name, array in found.items():
            np.testing.assert_array_equal(array, everything[name])
    for wrong in (["sentence_embedding", "logits"], "sentence_embedding"):
        with pytest.raises(
            UserError, match="were asked for; the model has last_hidden_state, sent"
        ) as raised:
            session.run(inputs, outputs=wrong)
        assert "Give a list" in str(raised.value.hint)
