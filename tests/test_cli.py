"""The command line as a user or a CI job calls it."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
import typer.core
import typer.main
from command_line import call, call_process, process_environment

from variator_export.cli.app import make_app
from variator_export.cli.train import train_app
from variator_export.core.environment import install_command
from variator_export.recipe.recipe import Recipe

COMMANDS = {
    "doctor": {"--for", "--format", "--help"},
    "schema": set(),
    "build": {
        "--ratio", "--backbone", "--task", "--plugin", "--module", "--assembly", "--target", "--precision",
        "--output", "--replace",
        "--speed", "--no-speed", "--all", "--jobs", "--show-recipe", "--push-to-hub", "--untrained",
        "--format", "--help",
    },
    "compile": {"--target", "--variant", "--recipe", "--compute-capability", "--timing-cache", "--jobs",
                "--format", "--help"},
    "merge": {"--format", "--help"},
    "push": {"--private", "--public", "--format", "--help"},
    "verify": {"--ratio", "--variant", "--reference", "--backbone", "--quick", "--bisect", "--reproduction",
               "--junit", "--summary", "--format", "--help"},
    "bench": {"--shape", "--ratio", "--variant", "--runtime", "--backbone", "--threads", "--openings",
              "--block-seconds", "--window", "--tolerance", "--max-rounds", "--profile",
              "--fail-under", "--output", "--format", "--help"},
    "report": {"--output", "--plots", "--format", "--help"},
    "run": {"--allow-unverified", "--lean-runtime",
            "--text", "--ratio", "--variant", "--target", "--truncate", "--format", "--help"},
    "serve": {"--slo-ms", "--max-loss", "--metric", "--allow-unknown-quality", "--policy", "--ratio",
              "--index", "--host", "--port", "--api-key-file", "--served-model-name", "--target",
              "--threads", "--max-texts", "--max-body-mb", "--max-queue", "--max-batch-tokens",
              "--max-connections", "--receive-timeout",
              "--refuse-late", "--no-refuse-late", "--truncate", "--no-truncate", "--calibration-seconds",
              "--help"},
    "embed": {"--input", "--output", "--text-column", "--id-column", "--no-header", "--ratio",
              "--variant", "--target", "--allow-unverified", "--lean-runtime", "--prompt",
              "--truncate", "--no-truncate", "--normalize", "--with-text", "--batch-size",
              "--chunk-size", "--processes", "--threads",
              "--replace", "--restart", "--format", "--help"},
    "export-triton": {"--output", "--backend", "--name", "--target", "--variant", "--default-variant",
                      "--bundle-path", "--execution-env", "--threads", "--max-batch-size",
                      "--preferred-batch-size", "--max-queue-delay-ms", "--queue-timeout-ms",
                      "--max-queue-size", "--priority-levels", "--instances", "--gpu",
                      "--compute-capability", "--tensorrt-version", "--allow-unverified", "--overwrite",
                      "--format", "--help"},
    "inspect": {"--kernels", "--format", "--help"},
    "evaluate": {"--data", "--text-column", "--pair-column", "--label-column", "--no-header", "--task",
                 "--backbone", "--runtime", "--max-tokens", "--assembly", "--card", "--format", "--help"},
    "import": {"--output", "--backbone", "--dtype", "--replace", "--push-to-hub", "--format", "--help"},
    "train pretrain": {"--text", "--ratio", "--plugin", "--output", "--backbone", "--preset", "--steps",
                       "--batch-size", "--learning-rate", "--schedule", "--warmup-steps", "--loss",
                       "--bottleneck-size", "--masking", "--start", "--no-decompression", "--min-tokens",
                       "--max-tokens", "--noise", "--held-out", "--text-field", "--seed", "--precision",
                       "--eval-every", "--patience", "--dtype", "--terms", "--replace", "--restart",
                       "--push-to-hub", "--format", "--help"},
    "train modules": {"--text", "--granularity", "--output", "--backbone", "--start", "--replace-begin",
                      "--replace-end", "--replace-rise", "--steps", "--batch-size", "--learning-rate",
                      "--schedule", "--warmup-steps", "--loss", "--min-tokens", "--max-tokens", "--held-out",
                      "--text-field", "--seed", "--precision", "--eval-every", "--patience", "--dtype",
                      "--terms", "--replace", "--restart", "--push-to-hub", "--format", "--help"},
    "train adapt": {"--backbone", "--plugin", "--module", "--data", "--text-column", "--pair-column",
                    "--label-column", "--no-header", "--validation", "--held-out", "--max-tokens",
                    "--loss", "--steps", "--batch-size", "--learning-rate", "--schedule",
                    "--warmup-steps", "--seed",
                    "--precision", "--eval-every", "--patience", "--dtype", "--terms", "--replace",
                    "--restart", "--push-to-hub", "--format", "--output", "--help"},
    "train finetune": {"--backbone", "--data", "--text-column", "--pair-column", "--label-column", "--epochs",
                       "--no-header", "--validation", "--held-out", "--max-tokens", "--steps",
                       "--batch-size", "--learning-rate", "--warmup-steps", "--seed", "--precision",
                       "--eval-every", "--patience", "--terms", "--replace", "--restart", "--format",
                       "--output", "--help"},
}  # fmt: skip


@pytest.fixture
def recipe_file(small_recipe: Recipe, tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(json.dumps(small_recipe.model_dump(mode="json")))
    return tmp_path / "small.yaml"


def test_the_surface_of_the_command_line() -> None:
    """An option that goes or changes its name breaks somebody's CI: do it knowingly."""
    commands = {command.name for command in make_app().registered_commands}
    commands |= {f"train {command.name}" for command in train_app.registered_commands}
    assert commands == set(COMMANDS)
    for name, options in COMMANDS.items():
        text = call(*name.split(), "--help").stdout
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text.partition("Examples")[2] + text)) >= options
        assert "Examples" in text
        assert f"variator-export {name}" in text


def test_the_list_of_commands_says_what_each_says_itself() -> None:
    """The list does not import them."""
    full = typer.main.get_command(make_app())
    listed = typer.main.get_command(make_app(()))
    assert isinstance(full, typer.core.TyperGroup)
    assert isinstance(listed, typer.core.TyperGroup)
    assert list(listed.commands) == list(full.commands)
    for name, command in full.commands.items():
        assert inspect.cleandoc(command.help or "").splitlines()[0] == listed.commands[name].help


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['variator-export', '--help']\n"
        "from variator_export.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'onnx', 'yaml', 'tokenizers'}\n"
        "print('loaded', sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Turn a backbone" in result.stdout
    assert "loaded []" in result.stdout


def test_untrained_plugins_of_the_ratios_that_are_asked_for(
    small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    command = ["build", "--backbone", str(small_model("bert")), "--untrained", "--target", "onnxruntime"]
    command += ["--no-speed", "--output", "out"]
    for more, words in (
        ((), "--untrained needs the ratios to initialise plugins for"),
        (("--ratio", "1"), "--untrained needs the ratios"),
        (("--ratio", "4", "--plugin", "x"), "--untrained and --plugin were both given"),
    ):
        result = call(*command, *more, cwd=tmp_path)
        assert (result.returncode, words in result.stderr) == (2, True), result.stderr
    result = call(*command, "--ratio", "4", "--format", "json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["untrained"] == ["ratio-4"]


def test_a_classifier_says_its_label(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_model("bert-classifier"), folder)
    config = json.loads((folder / "config.json").read_text())
    classes = len(config.get("id2label") or {0: "", 1: ""})
    names = [f"class-{index}" for index in range(classes)]
    config["id2label"] = {str(index): name for index, name in enumerate(names)}
    config["label2id"] = {name: index for index, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    build = ["build", "--backbone", str(folder), "--ratio", "1", "--target", "onnxruntime", "--no-speed"]
    assert call(*build, "--output", "out", cwd=tmp_path).returncode == 0
    result = call("run", "out", "--text", "Yes.", "--text", "The ferry.", "--format", "json", cwd=tmp_path)
    for row in json.loads(result.stdout)["results"]:
        logits = np.array(row["outputs"]["logits"])
        assert row["label"] == names[logits.argmax()]
        assert row["score"] == pytest.approx(np.exp(logits.max()) / np.exp(logits).sum(), abs=1e-6)
    assert "label" in call("run", "out", "--text", "Yes.", cwd=tmp_path).stdout


def test_optimum_cli_reaches_the_same_build(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Through Optimum's own registration, from an editable installation too."""
    cli = Path(sys.executable).parent / "optimum-cli"

    def optimum(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(cli), "export", "variator", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=process_environment()
        )

    assert "--plugin" in optimum("--help").stdout
    options = ["--model", str(small_model("bert")), "--task", "feature-extraction", "--ratio", "1"]
    options += ["--target", "onnxruntime", "--no-speed"]
    result = optimum(*options, "theirs")
    assert result.returncode == 0, result.stderr
    own = ["build", "--backbone", *options[1:], "--output", "ours"]
    assert call(*own, cwd=tmp_path).returncode == 0
    ours, theirs = (
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("ours", "theirs")
    )
    assert theirs["files"] == ours["files"]
    refused = optimum("--model", "./nowhere", "other")
    assert (refused.returncode, "is not a folder on this machine" in refused.stderr) == (1, True)


def test_version() -> None:
    result = call("--version")
    assert result.returncode == 0
    assert re.fullmatch(r"variator-export \d+\.\d+\.\d+\n", result.stdout)


def test_wrong_usage_is_2() -> None:
    for arguments in (
        ("bild",),
        ("build", "--ratoi", "4"),
        ("run",),
        ("run", "nowhere"),
        ("build", "--backbone", "x"),
        ("inspect",),
        ("build", "--format", "xml"),
    ):
        result = call(*arguments)
        assert result.returncode == 2, (arguments, result.stderr)
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ratio", "0"], "The ratio '0' is not a whole number"),
        (["--ratio", "1.5"], "The ratio '1.5' is not a whole number"),
        (["--ratio", "1000"], "no plugin of ratio 1000; there are plugins of the ratios 2, 3, 4"),
        (["--target", "tensorrt-rxt"], "--target tensorrt-rtx"),
        (["--precision", "fp4"], "'precision' is 'fp4'"),
        (["--plugin", "nowhere"], "The plugin folder nowhere does not exist"),
        (["--plugin", "a/b=nowhere"], "'plugins.0.name' is 'a/b'"),
        (["--backbone", "nowhere"], "The backbone nowhere is not a folder"),
        (["--target", "tensorrt"], install_command("tensorrt")),
    ],
)
def test_bad_input_is_1_with_one_message(
    recipe_file: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = call("build", str(recipe_file), "--output", str(tmp_path / "b"), *arguments)
    assert result.returncode == 1, result.stderr
    assert words in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "b").exists()


def test_an_error_is_a_document_too(recipe_file: Path) -> None:
    result = call("build", str(recipe_file), "--ratio", "9", "--format", "json")
    document = json.loads(result.stdout)
    assert document["error"]["exit_code"] == result.returncode == 1
    assert "no plugin of ratio 9" in document["error"]["message"]


def test_a_bug_keeps_its_traceback_and_is_70(small_bundle: Path) -> None:
    code = (
        "import variator_export.cli.inspect as i, sys\n"
        "def broken(*a): raise ZeroDivisionError('planted')\n"
        "i._variants_table = broken\n"
        f"sys.argv[1:] = ['inspect', {str(small_bundle)!r}]\n"
        "from variator_export.cli.main import main\nmain()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 70
    assert "ZeroDivisionError: planted" in result.stderr
    assert "This is a bug" in result.stderr


def test_build_as_a_document(recipe_file: Path, bundle_copy: Path) -> None:
    """Up to date but for the measurement, which is made now and found again afterwards."""
    recipe = json.loads(recipe_file.read_text())
    recipe["speed"] = {"batch_size": 2, "sequence_length": 16, "rounds": 2, "block_seconds": 0.01}
    recipe_file.write_text(json.dumps(recipe))
    result = call("build", str(recipe_file), "--output", str(bundle_copy), "--format", "json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    rows = document["speed"]["rows"]
    assert [(row["runtime"], row["ratio"]) for row in rows] == [
        (runtime, k) for runtime in ("eager", "onnxruntime") for k in (1, 2, 3, 4)
    ]
    for row in rows:
        assert row["median_ms"] > 0
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"] or row["ratio"] == 1
    assert rows[-1]["macs"] == rows[-1]["graph_macs"]
    assert rows[2]["macs"] < rows[0]["macs"]
    assert document["untrained"] == ["ratio-2", "ratio-3", "ratio-4"]
    assert {step["action"] for step in document["steps"]} <= {"made", "reused"}
    again = json.loads(
        call("build", str(recipe_file), "--output", str(bundle_copy), "--format", "json").stdout
    )
    assert again["speed"] == document["speed"]
    assert not again["published"]


def test_build_for_people(recipe_file: Path, bundle_copy: Path) -> None:
    result = call("build", str(recipe_file), "--output", str(bundle_copy))
    assert result.returncode == 0, result.stderr
    assert "ratio-4" in result.stdout
    assert "nothing that it depends on has changed" in result.stderr
    assert "were not trained" in result.stderr
    assert "\x1b[" not in result.stdout + result.stderr, "no colours or bars where nobody looks"


def test_run(small_bundle: Path) -> None:
    result = call("run", str(small_bundle), "--ratio", "2", "--text", "Yes.", "--text", "[bold] two words")
    assert result.returncode == 0, result.stderr
    assert "4x32" in result.stdout
    assert "[bold] two words" in result.stdout
    assert "only initialised" in result.stderr
    document = json.loads(
        call(
            "run", str(small_bundle), "--text", "Yes.", "--text", "Two words, or three.", "--format", "json"
        ).stdout
    )
    lengths = [len(entry["outputs"]["last_hidden_state"]) for entry in document["results"]]
    assert lengths == [4, 8], "a text's own tokens, without padding"


def test_a_full_standard_output(small_bundle: Path) -> None:
    command = f"{sys.executable} -m variator_export inspect {small_bundle} --format json > /dev/full"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "error: standard output: no space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_may_not_be_read_is_an_error_with_a_document(small_bundle: Path) -> None:
    code = (
        "import variator_export.cli.inspect as i, sys, errno\n"
        "def refuse(*a): raise PermissionError(errno.EACCES, 'Permission denied', 'secret.onnx')\n"
        "i.Bundle.load = refuse\n"
        f"sys.argv[1:] = ['inspect', {str(small_bundle)!r}, '--format', 'json']\n"
        "from variator_export.cli.main import main\nmain()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert json.loads(result.stdout)["error"]["message"] == "secret.onnx: permission denied."


def test_run_shows_no_control_characters(small_bundle: Path) -> None:
    result = call("run", str(small_bundle), "--text", "red \x1b[31m and\nnew")
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    both = call("run", str(small_bundle), "--text", "x", "--ratio", "2", "--variant", "ratio-3")
    assert both.returncode == 2
    assert "both given" in both.stderr


def test_run_refuses(small_bundle: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((str(tmp_path), "--text", "x"), "has no file manifest.json"),
        ((str(small_bundle), "--text", "x", "--ratio", "9"), "has no variant 9"),
        ((str(small_bundle), "--text", "x", "--variant", "fast"), "has no variant 'fast'"),
        ((str(small_bundle), "--text", "word " * 90, "--no-truncate"), "has 92 tokens; the limit is 64"),
        ((str(small_bundle), "--text", "x", "--target", "openvin"), "There is no target 'openvin'"),
        ((str(small_bundle), "--text", "x", "--target", "tensorrt-rtx"), "has no engine of ratio-1 for"),
    ):
        result = call("run", *arguments)
        assert result.returncode == 1, arguments
        assert words in result.stderr
        assert "Traceback" not in result.stderr
    assert call("run", str(small_bundle), "--text", "word " * 90, "--truncate").returncode == 0


def test_inspect(small_bundle: Path) -> None:
    result = call("inspect", str(small_bundle))
    assert result.returncode == 0
    for word in ("BertModel", "ratio-3", "initialised only", "weights.safetensors", "every hash"):
        assert word in result.stdout
    document = json.loads(call("inspect", str(small_bundle), "--format", "json").stdout)
    assert document["backbone"]["pad_token_id"] == 0


def test_a_short_form_of_help() -> None:
    for command in ([], ["build"], ["train"], ["train", "pretrain"]):
        assert call(*command, "-h").stdout == call(*command, "--help").stdout != ""


def test_output_that_is_not_utf_8(embedding_bundle: Path) -> None:
    """On a terminal or a pipe that is not UTF-8, nothing ends in a traceback, and JSON stays JSON."""
    environment = {"PYTHONIOENCODING": "ascii"}
    text = "Ça coûte 12 € 👩"
    command = ["run", str(embedding_bundle), "--text", text]
    shown = call_process(*command, environment=environment)
    assert (shown.returncode, "Traceback" in shown.stderr) == (0, False), shown.stderr
    document = call_process(*command, "--format", "json", environment=environment)
    assert json.loads(document.stdout)["results"][0]["text"] == text


def test_a_refused_build_leaves_no_lock(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    command = ["build", "--backbone", str(small_model("bert")), "--output", "b", "--target", "onnxruntime"]
    result = call(*command, "--ratio", "4", cwd=tmp_path)
    assert result.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_named_after_its_folder(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    command = ["build", "--backbone", str(small_model("bert")), "--ratio", "1", "--show-recipe"]
    shown = call(*command, "--output", "my bundle!", cwd=tmp_path)
    assert "name: my-bundle" in shown.stdout, shown.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["bench", "b", "--runtime", "onnxruntim"], "--runtime onnxruntime"),
        (["bench", "b", "--runtime", "xyz"], "Choose one of"),
        (["build", "--target", "CUDA"], "Choose one of"),
        (["build", "--target", "TensorRT-RTX"], "--target tensorrt-rtx"),
    ],
)
def test_a_hint_names_what_is_near_or_everything(arguments: list[str], hint: str) -> None:
    result = call(*arguments)
    assert result.returncode != 0
    assert hint in result.stderr.split("hint:")[1]


def test_ctrl_c_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("variator_export.cli.app.import_module", interrupted)
    result = call("build")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_a_checkpoint_in_half_precision_is_said_to_become_float32(
    small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(small_model("bert"), tmp_path / "half")
    weights = load_file(folder / "model.safetensors")
    half = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    command = ["build", "--backbone", "half", "--ratio", "1", "--target", "onnxruntime", "--no-speed"]
    result = call(*command, "--output", "b", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "half is stored in BF16; the bundle is in float32, twice the size" in result.stderr


@pytest.mark.parametrize(
    ("words", "place", "expected"),
    [
        (["build", "mini"], 2, ["minilm", "minilm-modular"]),
        (["build", "--target", "tensorrt-"], 3, ["tensorrt-rtx"]),
        (["verify", "b", "--target", "op"], 4, ["openvino"]),
        (["run", "b", "--target", "onnxruntime-t"], 4, ["onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"]),
        (["build", "sub/mi"], 2, ["sub/mine.yaml", "sub/mill/"]),
        (["bui"], 1, ["build"]),
    ],
)
def test_a_shell_completes(tmp_path: Path, words: list[str], place: int, expected: list[str]) -> None:
    (tmp_path / "sub" / "mill").mkdir(parents=True)
    (tmp_path / "sub" / "mine.yaml").write_text("")
    shell = {"_VARIATOR_EXPORT_COMPLETE": "complete_bash", "COMP_CWORD": str(place)}
    result = call(cwd=tmp_path, environment={**shell, "COMP_WORDS": " ".join(["variator-export", *words])})
    assert result.stdout.split() == expected
