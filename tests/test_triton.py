"""Model repositories for Triton: Triton's own schema takes them, and the Python model answers as documented.

Triton itself is not run: `triton_stand_in` calls the model as the documentation of its Python backend says.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from artefacts import Artefacts
from command_line import call
from conftest import BLOCK
from documented import REPOSITORY, Mention, mentions, problems
from google.protobuf import text_format
from small_disk import run_on_small_disk
from triton_stand_in import (
    InferenceRequest,
    Logger,
    Served,
    TritonError,
    TritonModelError,
    parse_config,
)
from typer.main import get_command

import variator_export
from variator_export import Bundle
from variator_export.bundle.engine_records import ENGINE_RECORDS, EngineRecord, records_document
from variator_export.cli.app import make_app
from variator_export.core.hashing import sha256_file
from variator_export.engines.tensorrt.api import FLAVOURS
from variator_export.serving.triton.prototext import Symbol, write_message
from variator_export.serving.triton.python_model import _use_gpu

TEXTS = ["A short text.", "A text that is quite a bit longer than the first one, and has a comma.", "No."]
PACKAGE = Path(variator_export.__file__).parent
EXAMPLES = REPOSITORY / "examples" / "serving"


def _texts(*texts: str | bytes) -> np.ndarray:
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    return np.array(raw, np.object_)[:, None]


def _ratios(*ratios: int) -> np.ndarray:
    return np.array(ratios, np.int32)[:, None]


@pytest.fixture(scope="module")
def embedding(artefacts: Artefacts, embedding_bundle: Path) -> Path:
    """A repository of the embedding bundle, not to be changed."""

    def make(folder: Path) -> None:
        result = call(
            "export-triton",
            str(embedding_bundle),
            "--output",
            str(folder / "models"),
            "--name",
            "small",
            "--default-variant",
            "2",
        )
        assert result.returncode == 0, result.stderr

    return artefacts.folder("triton/embedding", make) / "models" / "small"


@pytest.fixture(scope="module")
def served(embedding: Path) -> Served:
    return Served(embedding)


@pytest.fixture(scope="module")
def bundle(embedding_bundle: Path) -> Bundle:
    return Bundle.load(embedding_bundle)


def test_a_request_chooses_its_ratio_and_learns_what_it_got(served: Served, bundle: Bundle) -> None:
    by_input, by_parameter, by_name, default, rows = served.infer(
        InferenceRequest({"TEXT": _texts(*TEXTS), "RATIO": _ratios(4, 4, 4)}),
        InferenceRequest({"TEXT": _texts(TEXTS[1])}, parameters={"ratio": 1}),
        InferenceRequest({"TEXT": _texts(TEXTS[1])}, parameters={"ratio": "ratio-4"}),
        InferenceRequest({"TEXT": _texts(TEXTS[2])}),
        InferenceRequest({"TEXT": _texts(*TEXTS[:2]), "RATIO": _ratios(1, 4)}),
    )
    expected = {k: bundle.embed(TEXTS, ratio=k) for k in (1, 2, 4)}
    close: Callable[..., None] = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6)  # noqa: E731
    close(by_input["sentence_embedding"], expected[4])
    close(by_parameter["sentence_embedding"], expected[1][1:2])
    close(by_name["sentence_embedding"], expected[4][1:2])
    close(default["sentence_embedding"], expected[2][2:3])
    close(rows["sentence_embedding"], np.stack([expected[1][0], expected[4][1]]))
    assert by_input["RATIO"].tolist() == [[4], [4], [4]]
    assert [answer["RATIO"].tolist() for answer in (by_parameter, by_name, default)] == [[[1]], [[4]], [[2]]]
    assert rows["RATIO"].tolist() == [[1], [4]]
    assert np.abs(expected[1] - expected[4]).max() > 1e-3, "the ratios can be told apart"


def test_token_ids_give_what_their_text_gives_however_they_are_padded(served: Served, bundle: Bundle) -> None:
    encoder, names = bundle.text_encoder(), bundle.manifest.backbone.inputs
    inputs = encoder.encode(TEXTS, names)
    padded = {name: np.pad(array, ((0, 0), (0, 7)), constant_values=9) for name, array in inputs.items()}
    padded["attention_mask"][:, -7:] = 0
    alone = {"input_ids": encoder.encode(TEXTS[:1], names)["input_ids"]}
    answers = served.infer(InferenceRequest(padded), InferenceRequest(alone))
    expected = bundle.embed(TEXTS, ratio=2)
    np.testing.assert_allclose(answers[0]["sentence_embedding"], expected, atol=2e-6)
    np.testing.assert_allclose(answers[1]["sentence_embedding"], expected[:1], atol=2e-6)


def test_rows_of_one_ratio_run_together_and_those_of_similar_length_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, tuple[int, ...]]] = []
    for name, model in served._model._model._models.items():

        def run(inputs: Any, outputs: Any, name: str = name, run: Any = model.run) -> Any:
            ran.append((name, inputs["input_ids"].shape))
            assert outputs == ("sentence_embedding",), "the outputs of every token are not copied"
            return run(inputs, outputs)

        monkeypatch.setitem(
            served._model._model._models, name, type(model)(run, model.encoder, model.backbone, model.config)
        )
    long = " ".join(["words"] * 40)
    served.infer(
        InferenceRequest({"TEXT": _texts("One two.", long)}, parameters={"ratio": "4"}),
        InferenceRequest({"TEXT": _texts("Three four.")}, parameters={"ratio": 4}),
        InferenceRequest({"TEXT": _texts("Five six.")}, parameters={"ratio": 1}),
    )
    assert sorted(ran) == [("ratio-1", (1, 5)), ("ratio-4", (1, 42)), ("ratio-4", (2, 5))]


@pytest.mark.parametrize(
    ("inputs", "parameters", "words"),
    [
        ({}, {}, "neither TEXT nor input_ids"),
        ({"TEXT": _texts("a"), "input_ids": np.ones((1, 3), np.int64)}, {}, "TEXT and input_ids"),
        ({"TEXT": _texts(b"\xff\xfe")}, {}, "TEXT 1 is not UTF-8"),
        ({"TEXT": _texts("a")}, {"ratio": 16}, "has no variant 16; it has ratio-1 .ratio 1., ratio-2"),
        ({"TEXT": _texts("a")}, {"ratio": "sixteen"}, "has no variant 'sixteen'"),
        ({"TEXT": _texts("a")}, {"ratio": True}, "The parameter ratio is True"),
        ({"TEXT": _texts("a"), "RATIO": _ratios(2)}, {"ratio": 2}, "the input RATIO and the parameter"),
        ({"TEXT": _texts("a"), "RATIO": _ratios(2, 2)}, {}, "RATIO has 2 values for 1 rows"),
        ({"TEXT": _texts("a", "b"), "TEXT_PAIR": _texts("c")}, {}, "TEXT_PAIR has 1 texts; TEXT has 2"),
        ({"TEXT": _texts("a")}, {"prompt_name": "nothing"}, "The model has no prompt 'nothing'"),
        ({"input_ids": np.full((1, 3), -1)}, {}, "input_ids holds negative numbers"),
        ({"input_ids": np.ones((1, 65), np.int64)}, {}, "A row has 65 tokens; the model's limit is 64"),
        ({"input_ids": np.full((1, 3), 10**6)}, {}, "Check that every token id is in the model's vocabulary"),
        (
            {"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.ones((1, 4), np.int64)},
            {},
            "The inputs have the shapes",
        ),
        (
            {"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.array([[0, 1, 1]])},
            {},
            "not ones and then zeros",
        ),
        (
            {"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.zeros((1, 3), np.int64)},
            {},
            "not ones and then zeros",
        ),
        ({"input_ids": np.ones((1, 0), np.int64)}, {}, "not ones and then zeros"),
    ],
)
def test_a_wrong_request_gets_its_own_error_and_others_their_answer(
    served: Served, bundle: Bundle, inputs: dict[str, np.ndarray], parameters: dict[str, object], words: str
) -> None:
    wrong = InferenceRequest(inputs, ["sentence_embedding"], parameters)
    before, answer, after = served._model.execute(
        [
            InferenceRequest({"TEXT": _texts(TEXTS[0])}, ["sentence_embedding"]),
            wrong,
            InferenceRequest({"TEXT": _texts(TEXTS[1])}, ["sentence_embedding"]),
        ]
    )
    assert answer.error() is not None
    assert re.search(words, answer.error().message()), answer.error().message()
    assert answer.error().code() == TritonError.INVALID_ARG
    expected = bundle.embed(TEXTS[:2], ratio=2)
    for response, row in ((before, expected[:1]), (after, expected[1:])):
        assert response.error() is None, response.error().message()
        np.testing.assert_allclose(response.output_tensors()[0].as_numpy(), row, atol=2e-6)


def test_a_request_that_was_cancelled_is_not_run_and_an_error_of_ours_is_logged(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    (answer,) = served.infer(InferenceRequest({"TEXT": _texts("a")}, cancelled=True))
    assert answer.error is not None
    assert answer.error.code() == TritonError.CANCELLED
    monkeypatch.setattr(Logger, "lines", [])
    monkeypatch.setattr(served._model._model, "_outputs", lambda *_: [][0])
    (answer,) = served.infer(InferenceRequest({"TEXT": _texts("a")}))
    assert answer.error is not None
    assert (answer.error.code(), "IndexError" in answer.error.message()) == (TritonError.INTERNAL, True)
    assert "in _run" in Logger.lines[0], "with its place"


def test_only_the_outputs_that_are_asked_for_are_sent(served: Served) -> None:
    (answer,) = served.infer(InferenceRequest({"TEXT": _texts("a")}, ["RATIO"]))
    assert set(answer.arrays) == {"RATIO"}


def test_a_model_with_a_head_returns_its_outputs(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = bundle_of("xlm-roberta")  # answers questions, from pairs of texts
    result = call("export-triton", str(bundle.path), "--output", str(tmp_path / "m"), "--name", "head")
    assert result.returncode == 0, result.stderr
    first, second = ["A question.", "Another one, longer."], ["A context.", "A context."]
    inputs = {"TEXT": _texts(*first), "TEXT_PAIR": _texts(*second)}
    (answer,) = Served(tmp_path / "m" / "head").infer(InferenceRequest(inputs, parameters={"ratio": 4}))
    encoded = bundle.text_encoder().encode(first, bundle.manifest.backbone.inputs, pairs=second)
    expected = bundle.session().run(encoded, ratio=4)
    mask = encoded["attention_mask"].astype(bool)
    assert not mask.all()
    for name in ("start_logits", "end_logits"):
        assert answer[name].shape == mask.shape
        np.testing.assert_allclose(answer[name][mask], expected[name][mask], atol=1e-5)
        assert not answer[name][~mask].any(), "a row holds zeros after its tokens"


def test_the_copied_bundle_is_whole_and_another_path_is_used_as_it_is(
    embedding: Path, embedding_bundle: Path, tmp_path: Path, bundle: Bundle
) -> None:
    copy = Bundle.load(embedding / "1" / "bundle")
    copy.check_all()
    assert copy.manifest == bundle.manifest
    command = ["export-triton", str(embedding_bundle), "--output", str(tmp_path / "m"), "--name", "x"]
    result = call(*command, "--bundle-path", str(embedding_bundle), "--variant", "4", "--threads", "1")
    assert result.returncode == 0, result.stderr
    assert sum(1 for _ in (tmp_path / "m" / "x" / "1").iterdir()) == 1, "model.py alone"
    served = Served(tmp_path / "m" / "x")
    right, wrong = served.infer(
        InferenceRequest({"TEXT": _texts("a")}),
        InferenceRequest({"TEXT": _texts("a")}, parameters={"ratio": 1}),
    )
    assert right["RATIO"].tolist() == [[4]]
    assert wrong.error is not None
    assert wrong.error.message() == "This model runs ratio-4, not 1."


def test_a_bundle_that_does_not_open_is_tritons_exception(embedding: Path, tmp_path: Path) -> None:
    shutil.copytree(embedding, tmp_path / "small")
    (tmp_path / "small" / "1" / "bundle" / "weights.safetensors").unlink()
    with pytest.raises(TritonModelError, match=r"weights.safetensors is missing from the bundle"):
        Served(tmp_path / "small")


def test_each_gpu_instance_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, device, expected in (("", 1, "1"), ("3,5", 1, "5")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        _use_gpu(device)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_the_model_needs_neither_torch_nor_transformers(embedding: Path) -> None:
    tests = Path(__file__).parent
    code = BLOCK.replace('"onnx", ', "") + (
        f"sys.path.insert(0, {str(tests)!r})\n"
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from triton_stand_in import InferenceRequest, Served\n"
        f"served = Served(Path({str(embedding)!r}))\n"
        "text = np.array([[b'a']], np.object_)\n"
        "print(served.infer(InferenceRequest({'TEXT': text}))[0]['RATIO'].tolist())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (0, "[[2]]\n"), result.stderr


def test_the_configuration_says_what_was_asked_for(embedding_bundle: Path, tmp_path: Path) -> None:
    options = (
        "--max-batch-size 64 --preferred-batch-size 32 --preferred-batch-size 8 --max-queue-delay-ms 1.5 "
        "--queue-timeout-ms 250 --max-queue-size 1000 --priority-levels 3 --instances 2 --threads 4 "
        '--execution-env $$TRITON_MODEL_DIRECTORY/env.tar.gz --bundle-path /bundles/a"b\\é'
    )
    command = ["export-triton", str(embedding_bundle), "--output", str(tmp_path / "m"), "--name", "x"]
    result = call(*command, *options.split())
    assert result.returncode == 0, result.stderr
    config = parse_config((tmp_path / "m" / "x" / "config.pbtxt").read_text())
    assert {name: value.string_value for name, value in config.parameters.items()} == {
        "bundle": '/bundles/a"b\\é',
        "target": "onnxruntime",
        "default_variant": "ratio-1",
        "threads": "4",
        "EXECUTION_ENV_PATH": "$$TRITON_MODEL_DIRECTORY/env.tar.gz",
    }
    batching = config.dynamic_batching
    assert (config.max_batch_size, list(batching.preferred_batch_size)) == (64, [8, 32])
    assert (batching.max_queue_delay_microseconds, batching.priority_levels) == (1500, 3)
    assert batching.default_priority_level == 3, "the lowest, unless a request names another"
    policy = batching.default_queue_policy
    assert (policy.default_timeout_microseconds, policy.max_queue_size) == (250_000, 1000)
    assert (policy.timeout_action, policy.allow_timeout_override) == (policy.REJECT, True)
    (group,) = config.instance_group
    assert (group.kind, group.count) == (group.KIND_CPU, 2)
    assert all(tensor.optional and tensor.allow_ragged_batch for tensor in config.input)
    assert [tensor.name for tensor in config.output] == ["sentence_embedding", "RATIO"]


def test_an_unknown_field_is_found() -> None:
    for fields in ({"nam": "x"}, {"input": [{"name": "x", "shape": [1]}]}, {"input": [{"data_type": "x"}]}):
        with pytest.raises(text_format.ParseError):
            parse_config(write_message(fields))
    parse_config(write_message({"name": "x", "input": [{"data_type": Symbol("TYPE_FP32"), "dims": [1]}]}))


def test_graphs_of_each_ratio_open_in_onnxruntime_with_their_own_weights(
    embedding_bundle: Path, tmp_path: Path, bundle: Bundle
) -> None:
    command = ["export-triton", str(embedding_bundle), "--output", str(tmp_path / "m"), "--name", "x"]
    result = call(*command, "--backend", "onnxruntime", "--variant", "4", "--variant", "1", "--threads", "2")
    assert result.returncode == 0, result.stderr
    assert f"needs an ONNX Runtime in Triton that runs opset {bundle.manifest.opset}" in result.stdout
    encoded = bundle.text_encoder().encode(TEXTS, bundle.manifest.backbone.inputs)
    for ratio in (4, 1):
        folder = tmp_path / "m" / f"x-ratio-{ratio}"
        config = parse_config((folder / "config.pbtxt").read_text())
        assert (config.name, config.platform, config.backend) == (
            folder.name,
            "onnxruntime_onnx",
            "onnxruntime",
        )
        assert config.parameters["intra_op_thread_count"].string_value == "2"
        session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
        for found, declared in ((session.get_inputs(), config.input), (session.get_outputs(), config.output)):
            assert [tensor.name for tensor in found] == [tensor.name for tensor in declared]
            for tensor, own in zip(found, declared, strict=True):
                assert [dim if isinstance(dim, int) else -1 for dim in tensor.shape[1:]] == list(own.dims)
        outputs = session.run(["sentence_embedding"], encoded)[0]
        np.testing.assert_allclose(outputs, bundle.embed(TEXTS, ratio=ratio), atol=2e-6)
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "m").rglob("*") if path.is_file())


def _add_engines(folder: Path, *engines: tuple[str, str, str], verified: bool = True, **sidecar: Any) -> None:
    """Give a bundle engines (variant, platform, version) for TensorRT: plans by their header alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = Bundle.load(folder).manifest.backbone.inputs
    records = []
    for variant, platform, version in engines:
        name = f"engines/tensorrt/float32/{platform}-{version}/{variant}"
        plan = FLAVOURS["tensorrt"].magic.ljust(24, b"\0") + bytes(map(int, version.split("."))) + b"plan"
        content = {
            "target": "tensorrt",
            "version": version,
            "platform": platform,
            "options": {"tf32": False, "version_compatible": False, "strip_weights": False},
            "compute_capabilities": [],
            "profiles": [
                {"name": "one", "shapes": {key: [[1, 1], [1, 16], [4, 64]] for key in names}},
                {"name": "many", "shapes": {key: [[1, 1], [16, 32], [16, 64]] for key in names}},
            ],
            "made_from": {},
            **sidecar,
        }
        path = folder / f"{name}.engine"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plan)
        (folder / f"{name}.json").write_text(json.dumps(content))
        for file in (path, folder / f"{name}.json"):
            entry = {"sha256": sha256_file(file), "size_bytes": file.stat().st_size}
            manifest["files"][file.relative_to(folder).as_posix()] = entry
        manifest["engines"].append(
            {
                "target": "tensorrt",
                "precision": "float32",
                "variant": variant,
                "platform": platform,
                "version": version,
                "engine": f"{name}.engine",
                "sidecar": f"{name}.json",
            }
        )
        facts = (sha256_file(path), "NVIDIA L4", verified, 1.0, 4.0, "1x1", "eager", "2026-01-01T00:00:00Z")
        records.append(EngineRecord(*facts))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / ENGINE_RECORDS).parent.mkdir(exist_ok=True)
    (folder / ENGINE_RECORDS).write_text(json.dumps(records_document(records)))


V = "11.4.0.106"


def _export_plans(folder: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["export-triton", str(folder), "--output", str(output), "--backend", "tensorrt", "--name", "x"]
    return call(*command, *options)


def test_plans_are_chosen_by_compute_capability(bundle_copy: Path, tmp_path: Path) -> None:
    _add_engines(
        bundle_copy,
        *((f"ratio-{k}", gpu, V) for k in (2, 4) for gpu in ("sm89", "sm120", "ampere-plus")),
    )
    result = _export_plans(
        bundle_copy, tmp_path / "m", "--variant", "2", "--variant", "4", "--format", "json", "--gpu", "1"
    )
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert [model["name"] for model in document["models"]] == ["x-ratio-2", "x-ratio-4"]
    assert document["models"][0]["needs"] == f"TensorRT {V} in Triton, on sm89, sm120, ampere-plus"
    folder = tmp_path / "m" / "x-ratio-4"
    config = parse_config((folder / "config.pbtxt").read_text())
    assert (config.platform, config.backend, config.max_batch_size) == ("tensorrt_plan", "tensorrt", 16)
    assert dict(config.cc_model_filenames) == {"8.9": "sm89.plan", "12.0": "sm120.plan"}
    assert config.default_model_filename == "ampere-plus.plan"
    files = {path.name for path in (folder / "1").iterdir()}
    assert files == {"sm89.plan", "sm120.plan", "ampere-plus.plan"}
    (group,) = config.instance_group
    assert (group.kind, list(group.gpus), list(group.profile)) == (group.KIND_GPU, [1], ["0", "1"])
    assert [(tensor.name, list(tensor.dims)) for tensor in config.input] == [
        (name, [-1]) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert {tensor.name: list(tensor.dims) for tensor in config.output}["last_hidden_state"] == [-1, 32]
    one = _export_plans(bundle_copy, tmp_path / "n", "--variant", "2", "--compute-capability", "sm89")
    assert one.returncode == 0, one.stderr
    config = parse_config((tmp_path / "n" / "x-ratio-2" / "config.pbtxt").read_text())
    assert dict(config.cc_model_filenames) == {"8.9": "sm89.plan"}


@pytest.mark.parametrize(
    ("engines", "changes", "options", "words"),
    [
        ([], {}, (), "has no engine of ratio-1 for tensorrt"),
        ([("ratio-2", "sm89", V)], {}, (), "has no engine of ratio-1 for tensorrt"),
        ([("ratio-2", "sm89", V)], {}, ("sm90",), "no engine of ratio-2 for sm90; it has sm89"),
        (
            [("ratio-2", "sm89", V), ("ratio-2", "sm89", "11.5.0.1")],
            {},
            ("",),
            "several engines of ratio-2 for sm89.*--tensorrt-version 11.5.0.1",
        ),
        (
            [("ratio-2", "sm89", V), ("ratio-2", "sm90", "11.5.0.1")],
            {},
            ("",),
            "engines by TensorRT 11.4.0.106 and 11.5.0.1; a Triton has one TensorRT",
        ),
        ([("ratio-2", "sm89", V)], {"verified": False}, ("",), "FAILED its verification on NVIDIA L4"),
        (
            [("ratio-2", "sm89", V)],
            {"options": {"tf32": False, "version_compatible": False, "strip_weights": True}},
            ("",),
            "was built without weights, which Triton does not load into it",
        ),
    ],
)
def test_engines_that_triton_cannot_use_are_refused(
    bundle_copy: Path,
    tmp_path: Path,
    engines: list[tuple[str, str, str]],
    changes: dict[str, Any],
    options: Sequence[str],
    words: str,
) -> None:
    _add_engines(bundle_copy, *engines, **changes)
    chosen = ["--variant", "2"] if options else []
    chosen += [part for gpu in options if gpu for part in ("--compute-capability", gpu)]
    result = _export_plans(bundle_copy, tmp_path / "m", *chosen)
    assert result.returncode == 1
    assert re.search(words, " ".join(result.stderr.split())), result.stderr
    assert not (tmp_path / "m").exists()


def test_a_version_is_chosen_and_an_unverified_engine_only_on_request(
    bundle_copy: Path, tmp_path: Path
) -> None:
    _add_engines(bundle_copy, ("ratio-2", "sm89", V), ("ratio-2", "sm89", "11.5.0.1"), verified=False)
    output, options = tmp_path / "m", ("--variant", "2", "--tensorrt-version", "11.4")
    assert "--allow-unverified" in _export_plans(bundle_copy, output, *options).stderr
    result = _export_plans(bundle_copy, output, *options, "--allow-unverified")
    assert result.returncode == 0, result.stderr
    assert f"needs TensorRT {V}" in result.stdout
    missing = _export_plans(bundle_copy, tmp_path / "n", "--variant", "2", "--tensorrt-version", "11.4.0.1")
    assert "It has some by 11.4.0.106, 11.5.0.1." in missing.stderr
    too_many = _export_plans(
        bundle_copy, tmp_path / "n", *options, "--allow-unverified", "--max-batch-size", "17"
    )
    assert (too_many.returncode, "their profiles end at 16" in too_many.stderr) == (2, True)


def test_a_plan_that_contradicts_its_sidecar_and_other_profiles_are_refused(
    bundle_copy: Path, tmp_path: Path
) -> None:
    _add_engines(bundle_copy, ("ratio-2", "sm89", V))
    _add_engines(
        bundle_copy,
        ("ratio-2", "sm90", V),
        profiles=[{"name": "one", "shapes": {"input_ids": [[1, 1], [1, 1], [1, 1]]}}],
    )
    options = ("--variant", "2", "--allow-unverified")
    result = _export_plans(bundle_copy, tmp_path / "m", *options)
    assert "has other optimization profiles than" in result.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FLAVOURS, "tensorrt", FLAVOURS["tensorrt-rtx"])
        result = _export_plans(bundle_copy, tmp_path / "m", *options, "--compute-capability", "sm89")
    assert "its sidecar says tensorrt 11.4.0.106, and it is not a plan" in " ".join(result.stderr.split())


def test_plans_of_tensorrt_for_rtx_are_not_for_triton(bundle_copy: Path, tmp_path: Path) -> None:
    _add_engines(bundle_copy, ("any-ratio", "sm89", V), ("ratio-2", "sm89", V))
    manifest = bundle_copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"target": "tensorrt"', '"target": "tensorrt-rtx"'))
    result = _export_plans(bundle_copy, tmp_path / "m", "--variant", "2")
    assert "Triton's TensorRT backend cannot open plans of TensorRT for RTX" in " ".join(
        result.stderr.split()
    )
    assert "--backend python --target tensorrt-rtx" in " ".join(result.stderr.split())


def test_the_python_model_takes_along_the_engines_of_its_session_alone(
    bundle_copy: Path, tmp_path: Path
) -> None:
    _add_engines(bundle_copy, ("any-ratio", "sm89", V), ("ratio-2", "sm89", V))
    command = ["export-triton", str(bundle_copy), "--name", "x", "--target", "tensorrt"]
    result = call(*command, "--output", str(tmp_path / "m"))
    assert result.returncode == 0, result.stderr
    config = parse_config((tmp_path / "m" / "x" / "config.pbtxt").read_text())
    assert (config.max_batch_size, config.instance_group[0].kind) == (16, config.instance_group[0].KIND_GPU)
    copy = Bundle.load(tmp_path / "m" / "x" / "1" / "bundle")
    copy.check_all()
    assert [entry.variant for entry in copy.manifest.engines] == ["any-ratio"]
    assert copy.engine_status(copy.manifest.engines[0]).startswith("verified on NVIDIA L4")
    assert len(list(copy.path.rglob("*.engine"))) == 1
    result = call(*command, "--output", str(tmp_path / "n"), "--variant", "4")
    assert "has no engine of ratio-4 for tensorrt" in result.stderr
    with pytest.raises(TritonModelError, match="no engine of any-ratio for this machine"):
        Served(tmp_path / "m" / "x")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--backend", "pytorch"), 2, "--backend 'pytorch' is not one of python, onnxruntime, tensorrt"),
        (("--target", "cpu"), 2, "--target 'cpu' is not one of"),
        (("--backend", "tensorrt", "--target", "onnxruntime"), 2, "--target is for --backend python or"),
        (("--backend", "onnxruntime", "--bundle-path", "x"), 2, "--bundle-path is for --backend python, not"),
        (("--compute-capability", "sm89"), 2, "--compute-capability is for --backend tensorrt, not python"),
        (("--backend", "tensorrt", "--compute-capability", "8.9"), 2, "'8.9' is not a compute capability"),
        (("--backend", "tensorrt", "--tensorrt-version", "x"), 2, "'x' is not a version"),
        (
            ("--backend", "onnxruntime", "--target", "openvino"),
            2,
            "openvino is not for Triton's ONNX Runtime",
        ),
        (("--gpu", "0"), 2, "--gpu names a GPU, and the model runs on the CPU"),
        (("--preferred-batch-size", "64"), 2, "64 is more than the largest batch, 32"),
        (("--name", "a/b"), 2, "'a/b' is not a name for a model"),
        (("--variant", "2", "--variant", "4"), 2, "runs one variant, or all of them in one session"),
        (("--variant", "2", "--default-variant", "4"), 2, "--default-variant ratio-4 is not ratio-2"),
        (("--variant", "16"), 1, "has no variant 16"),
        (("--target", "tensorrt"), 1, "has no engine of any-ratio for tensorrt"),
    ],
)
def test_wrong_options(
    embedding_bundle: Path, tmp_path: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    result = call("export-triton", str(embedding_bundle), "--output", str(tmp_path / "m"), *options)
    assert (result.returncode, words in result.stderr) == (code, True), result.stderr
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_what_exists_is_replaced_only_on_request_and_only_if_it_is_a_repository(
    embedding_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "models"
    command = [
        "export-triton",
        str(embedding_bundle),
        "--output",
        str(output),
        "--bundle-path",
        "/b",
        "--name",
    ]
    output.mkdir()
    result = call(*command, "one")
    assert result.returncode == 0, result.stderr
    assert f"Serve it: tritonserver --model-repository={output}" in result.stderr
    assert "--overwrite" in call(*command, "two").stderr
    assert call(*command, "two", "--overwrite").returncode == 0
    assert [path.name for path in output.iterdir()] == ["two"]
    (output / "notes.txt").write_text("mine")
    result = call(*command, "three", "--overwrite")
    assert (result.returncode, "is not a model repository" in result.stderr) == (1, True)
    assert (output / "notes.txt").exists()
    missing = call("export-triton", str(tmp_path / "nothing"), "--output", str(tmp_path / "n"))
    assert (missing.returncode, "There is no bundle at" in missing.stderr) == (1, True)


def test_a_full_disk_leaves_the_old_repository(embedding_bundle: Path, tmp_path: Path) -> None:
    export = f"python -m variator_export export-triton '{embedding_bundle}' --overwrite --output $DISK/m"
    result = run_on_small_disk(
        f"{export} --name old --bundle-path /b && {export} --name new; echo $?; ls $DISK/m",
        tmp_path / "disk",
        size="1m",
    )
    assert "no space left on device. The previous content is unchanged." in result.stderr
    assert result.stdout.split()[-2:] == ["1", "old"]


def _documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def _dockerfile(path: Path) -> dict[str, str]:
    """The last instruction of each kind."""
    text = re.sub(r"(?m)^\s*#.*\n", "", path.read_text()).replace("\\\n", " ")
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines() if line.strip()}


def test_the_image_runs_the_server_as_a_user_without_a_shell() -> None:
    image = _dockerfile(EXAMPLES / "Dockerfile")
    assert "[onnxruntime,serve]" in image["RUN"]
    assert f"--uid {image['USER']} " in image["RUN"]
    arguments = json.loads(image["ENTRYPOINT"]) + json.loads(image["CMD"])
    assert arguments[:5] == ["variator-export", "serve", "/bundle", "--host", "0.0.0.0"]
    assert problems(get_command(make_app()), Mention(tuple(arguments[1:]), whole=True)) == []
    port = arguments[arguments.index("--port") + 1]
    assert image["EXPOSE"] == port
    assert f"http://127.0.0.1:{port}/health" in image["HEALTHCHECK"]
    assert " CMD [" in image["HEALTHCHECK"]


def test_compose_and_prometheus_agree_with_the_image() -> None:
    image = _dockerfile(EXAMPLES / "Dockerfile")
    (compose,), (prometheus,) = _documents("compose.yaml"), _documents("prometheus.yml")
    server = compose["services"]["server"]
    assert server["command"] == json.loads(image["CMD"])
    assert server["ports"] == [f"{image['EXPOSE']}:{image['EXPOSE']}"]
    assert server["volumes"][0].endswith(":/bundle:ro")
    assert int(server["environment"]["OMP_NUM_THREADS"]) == server["cpus"]
    (job,) = prometheus["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"][0]["targets"] == [f"server:{image['EXPOSE']}"]
    mounted = compose["services"]["prometheus"]["volumes"][0].split(":")[0]
    assert (EXAMPLES / mounted).is_file()
    assert f"docker build -t {server['image']} " in (EXAMPLES / "README.md").read_text()


def test_the_objects_of_kubernetes_belong_together() -> None:
    image = _dockerfile(EXAMPLES / "Dockerfile")
    deployment, service, autoscaler = _documents("kubernetes.yaml")
    (by_queue,) = _documents("kubernetes-queue.yaml")
    kinds = [(document["apiVersion"], document["kind"]) for document in (deployment, service, autoscaler)]
    assert kinds == [
        ("apps/v1", "Deployment"),
        ("v1", "Service"),
        ("autoscaling/v2", "HorizontalPodAutoscaler"),
    ]
    name, template = deployment["metadata"]["name"], deployment["spec"]["template"]
    assert template["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    assert template["metadata"]["labels"] == service["spec"]["selector"]
    assert "replicas" not in deployment["spec"]
    for scaler in (autoscaler, by_queue):
        assert (scaler["kind"], scaler["metadata"]) == (autoscaler["kind"], autoscaler["metadata"])
        assert scaler["spec"]["scaleTargetRef"] == {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": name,
        }
    assert autoscaler["spec"]["metrics"][0]["resource"]["name"] == "cpu"
    metric = by_queue["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert metric in (EXAMPLES / "README.md").read_text()
    assert f'"{metric}"' in "".join(path.read_text() for path in PACKAGE.glob("serving/http/*.py"))
    (server,) = template["spec"]["containers"]
    (port,) = server["ports"]
    assert (str(port["containerPort"]), port["name"]) == (
        image["EXPOSE"],
        service["spec"]["ports"][0]["targetPort"],
    )
    assert template["metadata"]["annotations"]["prometheus.io/port"] == image["EXPOSE"]
    assert server["args"] == json.loads(image["CMD"])
    assert "command" not in server, "the image's entrypoint runs"
    assert template["spec"]["securityContext"]["runAsUser"] == int(image["USER"])
    probes = {
        kind: server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")
    }
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    _, seconds = server["lifecycle"]["preStop"]["exec"]["command"]
    assert template["spec"]["terminationGracePeriodSeconds"] > int(seconds)
    assert server["env"] == [{"name": "OMP_NUM_THREADS", "value": server["resources"]["limits"]["cpu"]}]


def test_the_example_for_triton_serves_where_the_export_is_mounted() -> None:
    image = _dockerfile(EXAMPLES / "triton" / "Dockerfile")
    assert json.loads(image["ENTRYPOINT"]) == ["tritonserver", "--model-repository=/models"]
    text = (EXAMPLES / "triton" / "README.md").read_text()
    found = [mention for page in (text, (EXAMPLES / "README.md").read_text()) for mention in mentions(page)]
    assert any(mention.words[0] == "export-triton" for mention in found)
    command_line = get_command(make_app())
    wrong = [problem for mention in found for problem in problems(command_line, mention)]
    assert [problem for problem in wrong if not re.search("--(shm-size|entrypoint)", problem)] == []
    body = json.loads(re.search(r"-d '(\{.*?\})'", text, re.DOTALL)[1])  # type: ignore[index]
    assert [tensor["name"] for tensor in body["inputs"]] == ["TEXT"]
    assert body["parameters"] == {"ratio": 4}
