"""`bench` of bundles that generate text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import call
from conftest import plugin_for

from variator_export import Bundle, build
from variator_export.benchmark import text_benchmark
from variator_export.benchmark.schedule import TimingSettings
from variator_export.benchmark.text_benchmark import RequestShape, bench_text
from variator_export.benchmark.timing import Timings
from variator_export.core.errors import UserError
from variator_export.model.backbone import Backbone
from variator_export.model.plugin_file import save_plugin
from variator_export.recipe.recipe import Recipe

QUICK = ("--openings", "2", "--block-seconds", "0.01", "--max-rounds", "4", "--window", "2")


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory,
    small_model: Callable[[str], Path],
    load_model: Callable[..., Backbone],
) -> Path:
    """A small T5 whose tokenizer names the special tokens that CTranslate2 asks for."""
    folder = tmp_path_factory.mktemp("bench")
    shutil.copytree(small_model("t5-gated-text"), folder / "model")
    settings = folder / "model" / "tokenizer_config.json"
    tokens = {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | tokens))
    save_plugin(plugin_for(load_model("t5-gated-text"), 4), folder / "plugin")
    recipe = {
        "name": "bench",
        "backbone": {"source": str(folder / "model")},
        "plugins": [{"source": str(folder / "plugin")}],
        "targets": ["onnxruntime"],
        "speed": None,
    }
    return build(Recipe.model_validate(recipe), folder / "bundle").bundle


def test_requests_are_timed_on_every_runtime(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    done = call(
        *(
            "bench",
            str(bundle),
            "--shape",
            "2x16",
            "--new-tokens",
            "1",
            "--new-tokens",
            "5",
            "--num-beams",
            "2",
        ),
        *(*QUICK, "--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    assert "2x16 tokens in, 5 out, 2 beams" in done.stdout
    result = json.loads(output.read_text())
    assert [shape["shape"]["new_tokens"] for shape in result["shapes"]] == [1, 5]
    for shape in result["shapes"]:
        assert [(row["runtime"], row["variant"]) for row in shape["rows"]] == [
            *(
                ("eager", "ratio-1"),
                ("eager", "ratio-4"),
                ("onnxruntime", "ratio-1"),
                ("onnxruntime", "ratio-4"),
            ),
            *(("ctranslate2", "ratio-1"), ("ctranslate2-int8", "ratio-1")),
        ], done.stderr
        for row in shape["rows"]:
            assert min(row["request_ms"], row["first_token_ms"], row["speedup_low"], row["speedup_high"]) > 0
            assert len(row["speedup_of_openings"]) == 2
            tokens = shape["shape"]["new_tokens"]
            assert row["new_tokens_per_second"] == pytest.approx(2e3 * tokens / row["request_ms"], rel=1e-2)
            if tokens == 1:
                assert row["token_ms"] is None
                assert row["speedup_allowed"] == pytest.approx(row["speedup"], rel=1e-3), (
                    "all of it is encoder"
                )
            else:
                expected = (row["request_ms"] - row["first_token_ms"]) / (tokens - 1)
                assert row["token_ms"] == pytest.approx(expected, abs=2e-3)


def test_what_the_encoder_s_saving_allows(bundle: Path) -> None:
    """Of a request of 100 ms the encoder saves 20 ms, so 80 ms are left."""
    found = Bundle.load(bundle)
    subjects = [
        text_benchmark._Subject("onnxruntime", variant, lambda *_: None)
        for variant in found.manifest.variants
    ]
    milliseconds = {"ratio-1/1": 40.0, "ratio-1/7": 100.0, "ratio-4/1": 20.0, "ratio-4/7": 90.0}
    timings = {f"onnxruntime/{key}": Timings((((ms,), (ms,)),)) for key, ms in milliseconds.items()}
    plain, four = text_benchmark._rows(subjects, RequestShape(2, 8, 7, 1), timings, found.manifest.backbone)
    assert (plain["token_ms"], plain["speedup"], plain["speedup_allowed"]) == (10.0, 1.0, 1.0)
    assert (four["first_token_ms"], four["token_ms"]) == (20.0, pytest.approx(70 / 6, abs=1e-3))
    assert (four["speedup_allowed"], four["speedup"]) == (1.25, pytest.approx(100 / 90, abs=1e-4))
    assert four["share_of_allowed"] == pytest.approx(100 / 90 / 1.25, abs=1e-4)
    assert plain["new_tokens_per_second"] == 140.0


def test_the_gate_looks_at_whole_requests(bundle: Path) -> None:
    arguments = (
        "bench",
        str(bundle),
        "--shape",
        "1x8",
        "--new-tokens",
        "2",
        "--runtime",
        "onnxruntime",
        *QUICK,
    )
    slow = call(*arguments, "--fail-under", "1000")
    assert (slow.returncode, "TOO SLOW" in slow.stderr) == (4, True), slow.stderr
    assert "1x8 tokens in, 2 out" in slow.stderr


def test_what_cannot_be_timed_is_refused(bundle: Path, small_bundle: Path, tmp_path: Path) -> None:
    limited = tmp_path / "limited"
    shutil.copytree(bundle, limited)
    manifest = json.loads((limited / "manifest.json").read_text())
    manifest["backbone"] |= {"max_length": 64, "max_output_length": 64}
    (limited / "manifest.json").write_text(json.dumps(manifest))
    for arguments, code, words in (
        (
            (str(bundle), "--runtime", "torch.compile"),
            2,
            "cannot time a model that generates text with the runtime torch.compile",
        ),
        ((str(bundle), "--profile"), 2, "bench does not profile it"),
        ((str(limited), "--shape", "1x900"), 1, "over the model's limit"),
        ((str(limited), "--new-tokens", "900"), 1, "tokens out are over the model's limit of 64"),
        ((str(small_bundle), "--new-tokens", "5"), 2, "does not generate text"),
    ):
        refused = call("bench", *arguments)
        assert (refused.returncode, words in refused.stderr) == (code, True), refused.stderr


def test_an_alternative_that_fails_is_left_out(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctranslate2

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such model")

    monkeypatch.setattr(ctranslate2, "Translator", fail)
    settings = TimingSettings(openings=1, block_seconds=0.01, window=None, max_rounds=2)
    shape = RequestShape(1, 8, 2, 1)
    found = bench_text(bundle, [shape], [1], settings=settings)
    assert [row["runtime"] for row in found.shapes[0].rows] == ["eager", "onnxruntime"]
    with pytest.raises(UserError, match="no such model"):
        bench_text(bundle, [shape], [1], runtimes=["ctranslate2"], settings=settings)
