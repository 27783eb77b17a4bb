"""Training on small real models: the loss falls, a killed run ends the same, two processes are one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import Artefacts
from small_disk import run_on_small_disk

from variator_export.cli.app import make_app
from variator_export.core.errors import UserError
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.data.texts import read_texts
from variator_export.model.augmented import PlainModel
from variator_export.model.backbone import Backbone, load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.plugin_file import load_plugin, load_plugin_config
from variator_export.model.source import resolve_source
from variator_export.text.tokenizer import TextEncoder
from variator_export.training import losses, plugin_run, trainer
from variator_export.training.adapt import adapt
from variator_export.training.checkpoints import last_checkpoint
from variator_export.training.finetune import finetune
from variator_export.training.passages import Passages, tokenize_documents
from variator_export.training.precision import choose_precision
from variator_export.training.pretrain import pretrain
from variator_export.training.results import TrainedFolders
from variator_export.training.run import Run
from variator_export.training.settings import Losses, Optimisation, PassageSettings, PluginShape
from variator_export.training.task_data import divide

REPOSITORY = Path(__file__).parent.parent
PASSAGES = PassageSettings(min_tokens=6, max_tokens=24, held_out=0.1, held_out_passages=32)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the prose of this project's own documentation."""
    folder = tmp_path_factory.mktemp("texts")
    for page in sorted((REPOSITORY / "docs").glob("*.md")):
        shutil.copyfile(page, folder / f"{page.stem}.txt")
    return str(folder)


def _load(folder: Path) -> Backbone:
    info = read_backbone_info(resolve_source(str(folder)))
    return load_backbone(info, TextEncoder(folder).pad_token_id)


def _pretrain(folder: Path, texts: str, output: Path, **options: Any) -> TrainedFolders:
    optimisation = {"steps": 12, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 2, "eval_every": 4}
    shape = {"ratios": (2, 4), "bottleneck_size": 8}
    run = {name: options.pop(name) for name in ("replace", "restart") if name in options}
    return pretrain(
        _load(folder),
        read_texts([texts]),
        Run(output, **run),
        plugins=PluginShape(**(shape | options.pop("shape", {}))),
        losses=options.pop("losses", Losses(hidden=1.0, layers=0.1, embedding=1.0)),
        passages=options.pop("passages", PASSAGES),
        optimisation=Optimisation(**(optimisation | options.pop("optimisation", {}))),
        **options,
    )


@pytest.fixture(scope="module")
def trained(artefacts: Artefacts, embedding_model: Path, texts: str) -> Path:
    """Plugins of ratio 2 and 4 for the small BERT, not to be changed."""

    def make(folder: Path) -> None:
        _pretrain(embedding_model, texts, folder / "plugins")

    return artefacts.folder("trained", make) / "plugins"


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_plugin(folder).tensors)


def _assert_same_plugins(first: Path, second: Path) -> None:
    for ratio in ("ratio-2", "ratio-4"):
        assert (first / ratio / "plugin.safetensors").read_bytes() == (
            second / ratio / "plugin.safetensors"
        ).read_bytes()


def test_the_loss_falls_and_the_folder_says_how_it_was_made(
    tmp_path: Path, embedding_model: Path, texts: str
) -> None:
    result = _pretrain(embedding_model, texts, tmp_path / "plugins", optimisation={"steps": 60})
    held_out = result.history.held_out
    assert held_out[-1].metrics["ratio-4"] < 0.9 * held_out[0].metrics["ratio-4"]
    assert list(result.folders) == ["ratio-2", "ratio-4"]
    folder = result.folders["ratio-4"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "loss.svg",
        "plugin.safetensors",
        "plugin_config.json",
    ]
    config = load_plugin_config(folder)
    assert config.training is not None
    assert config.training["loss"] == result.losses["ratio-4"]
    assert config.training["settings"]["losses"]["embedding"] == 1.0
    assert {source["name"] for source in config.training["data"]} >= {"bundle.txt", "recipes.txt"}
    assert config.backbone is not None
    assert config.backbone.weights_sha256 == resolve_source(str(embedding_model)).weights_sha256
    assert {array.dtype for array in _tensors(folder).values()} == {np.dtype(np.float16)}
    card = (folder / "README.md").read_text()
    assert "ratio 4" in card
    assert config.training["data"][0]["sha256"][:16] in card
    assert not list(tmp_path.glob(".plugins.training"))


@pytest.mark.parametrize("name", ["bert-classifier", "t5-v1.0", "t5-v1.1"])
def test_every_family_can_be_trained(
    tmp_path: Path, texts: str, small_model: Callable[[str], Path], name: str
) -> None:
    result = _pretrain(
        small_model(name),
        texts,
        tmp_path / "plugins",
        losses=Losses(hidden=1.0, layers=0.1),
        optimisation={"steps": 40, "eval_every": 10},
    )
    held_out = result.history.held_out
    assert held_out[-1].metrics["ratio-2"] < held_out[0].metrics["ratio-2"]


def test_bfloat16_trains_nearly_the_same_in_float32_parameters(
    tmp_path: Path, embedding_model: Path, texts: str, trained: Path
) -> None:
    output = tmp_path / "plugins"
    result = _pretrain(embedding_model, texts, output, optimisation={"precision": "bfloat16"})
    single = load_plugin_config(trained / "ratio-4").training
    assert single is not None
    assert result.losses["ratio-4"] == pytest.approx(single["loss"], rel=0.05)
    assert result.losses["ratio-4"] != single["loss"]
    # A step of bfloat16 at 1 is 0.008: parameters kept in it would hardly move.
    half = _tensors(output / "ratio-4")["layers.0.compress.weight"]
    assert not np.array_equal(half, torch.from_numpy(half.copy()).bfloat16().half().numpy())


def test_auto_precision_is_what_the_hardware_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose_precision("auto") == expected
        assert choose_precision("float32") == "float32"


def test_the_teacher_is_the_backbone_itself(
    embedding_model: Path, small_model: Callable[[str], Path]
) -> None:
    """Hidden states come out of the place that the loss means: the last is what the head gets."""
    for folder in (embedding_model, small_model("t5-v1.1")):
        backbone = _load(folder)
        encoder = TextEncoder(folder)
        rows = encoder.encode(["The ferry leaves at seven."], backbone.spec.family.inputs, None)
        found = PlainModel(backbone)(
            {name: torch.from_numpy(array) for name, array in rows.items()}, hidden_states=True
        )
        layers = backbone.info.size.num_layers
        assert torch.equal(found[f"hidden_states.{layers - 1}"], found["last_hidden_state"])
        assert f"hidden_states.{layers}" not in found
        assert not torch.equal(found["hidden_states.0"], found["hidden_states.1"])


def test_ratios_of_one_run_do_not_depend_on_each_other(
    tmp_path: Path, embedding_model: Path, texts: str, trained: Path
) -> None:
    alone = _pretrain(embedding_model, texts, tmp_path / "alone", shape={"ratios": (4,)})
    found, expected = _tensors(alone.folders["ratio-4"]), _tensors(trained / "ratio-4")
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6)


def test_the_backbone_stays_as_it_is(tmp_path: Path, embedding_model: Path, texts: str) -> None:
    backbone = _load(embedding_model)
    before = {name: tensor.clone() for name, tensor in backbone.state.items()}
    pretrain(
        backbone,
        read_texts([texts]),
        Run(tmp_path / "plugins"),
        plugins=PluginShape(ratios=(2,)),
        losses=Losses(),
        passages=PASSAGES,
        optimisation=Optimisation(steps=2, batch_size=2, learning_rate=1e-2, warmup_steps=0),
    )
    for name, tensor in backbone.state.items():
        assert torch.equal(tensor, before[name]), name


def _interrupt(monkeypatch: pytest.MonkeyPatch, step: int, run: Callable[[], object]) -> None:
    """Break a run off after a step, as Ctrl-C does."""

    def break_off(_self: object, _args: object, state: Any, *_: object, **__: object) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Bar, "on_step_end", break_off)
        with pytest.raises(KeyboardInterrupt):
            run()


def _command(folder: Path, texts: str, output: Path, steps: int = 12) -> list[str]:
    return (
        f"train pretrain --backbone {folder} --text {texts} --ratio 2 --ratio 4 --bottleneck-size 8 "
        f"--loss hidden=1 --loss layers=0.1 --loss embedding=1 --min-tokens 6 --max-tokens 24 "
        "--held-out 0.1 --held-out-passages 32 "
        f"--preset paper --learning-rate 3e-3 --warmup-steps 2 --eval-every 4 --batch-size 4 "
        f"--precision float32 --steps {steps} --output {output}"
    ).split()


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CI": "true"}


def test_a_run_that_was_killed_goes_on_and_ends_the_same(
    tmp_path: Path, embedding_model: Path, texts: str, trained: Path
) -> None:
    output = tmp_path / "plugins"
    command = [sys.executable, "-m", "variator_export", *_command(embedding_model, texts, output)]
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    work = tmp_path / ".plugins.training"
    # Whole, that is: one whose last file is only begun is passed over, and rightly.
    while last_checkpoint(work) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stdout.read() if process.stdout else ""
    assert not output.exists()
    resumed = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=True)
    assert "continuing from step 4" in resumed.stderr or "continuing from step 8" in resumed.stderr
    _assert_same_plugins(output, trained)
    assert not list(tmp_path.glob(".plugins.training"))


def test_a_checkpoint_that_was_cut_off_is_passed_over(
    tmp_path: Path, embedding_model: Path, texts: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plugin_run, "save_plugin", fail)
        with pytest.raises(KeyboardInterrupt):
            _pretrain(embedding_model, texts, tmp_path / "plugins")
    checkpoints = tmp_path / ".plugins.training"
    state = checkpoints / "checkpoint-12" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    _pretrain(embedding_model, texts, tmp_path / "plugins")
    _assert_same_plugins(tmp_path / "plugins", trained)


@pytest.mark.parametrize("size", ["40k", "130k"])
def test_a_full_disk_is_said_in_words(tmp_path: Path, embedding_model: Path, texts: str, size: str) -> None:
    command = " ".join(_command(embedding_model, texts, Path("$DISK/plugins")))
    result = run_on_small_disk(
        f"OMP_NUM_THREADS=1 python -m variator_export {command}; echo exit $?",
        tmp_path / "disk",
        size=size,
    )
    assert "exit 1" in result.stdout, result.stderr
    assert "no space left on device" in result.stderr
    assert "goes on from the last whole checkpoint" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unfinished_run_of_another_command_is_not_continued(
    tmp_path: Path, embedding_model: Path, texts: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "plugins"
    _interrupt(monkeypatch, 10, lambda: _pretrain(embedding_model, texts, output, optimisation={"steps": 99}))
    with pytest.raises(UserError, match=r": settings\.optimisation\.steps was 99 and is 12\.") as error:
        _pretrain(embedding_model, texts, output)
    assert error.value.hint is not None
    assert "--restart" in error.value.hint
    _pretrain(embedding_model, texts, output, restart=True)
    _assert_same_plugins(output, trained)
    # A run that did not come to its first checkpoint stands in nobody's way.
    _interrupt(
        monkeypatch,
        2,
        lambda: _pretrain(embedding_model, texts, output, optimisation={"steps": 99}, replace=True),
    )
    _pretrain(embedding_model, texts, output, replace=True)
    _assert_same_plugins(output, trained)


def test_early_stopping_is_the_same_after_a_kill(
    tmp_path: Path, embedding_model: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 100, "learning_rate": 0.3, "schedule": "constant", "patience": 3, "eval_every": 3}

    def run(name: str) -> TrainedFolders:
        return _pretrain(embedding_model, texts, tmp_path / name, optimisation=options)

    unbroken = run("unbroken").history
    assert unbroken.steps < 100
    _interrupt(monkeypatch, unbroken.steps - 1, lambda: run("killed"))
    assert run("killed").history == unbroken
    _assert_same_plugins(tmp_path / "killed", tmp_path / "unbroken")


def test_fine_tuning_and_adaptation_go_on_after_a_kill(
    tmp_path: Path, embedding_model: Path, classifier: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = read_examples(str(_task(tmp_path / "train.tsv")), Columns("sentence"))
    optimisation = Optimisation(steps=12, batch_size=8, learning_rate=1e-3, warmup_steps=0, eval_every=4)

    def run(name: str) -> None:
        source = resolve_source(str(embedding_model))
        finetune(source, examples, examples, Run(tmp_path / f"model-{name}"), optimisation=optimisation)
        adapt(
            _load(classifier),
            {"ratio-2": trained / "ratio-2", "ratio-4": trained / "ratio-4"},
            examples,
            examples,
            Run(tmp_path / f"plugins-{name}"),
            losses=Losses(),
            optimisation=optimisation,
        )

    run("unbroken")
    _interrupt(monkeypatch, 7, lambda: run("killed"))
    run("killed")
    first, second = (tmp_path / f"model-{name}" / "model.safetensors" for name in ("unbroken", "killed"))
    assert first.read_bytes() == second.read_bytes()
    _assert_same_plugins(tmp_path / "plugins-unbroken", tmp_path / "plugins-killed")


def test_a_run_on_another_column_is_another_run(
    tmp_path: Path, embedding_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("x\ty\tlabel\n" + "".join(f"one {i}\ttwo {i}\t{i % 2}\n" for i in range(20)))
    optimisation = Optimisation(steps=12, batch_size=4, learning_rate=1e-3, warmup_steps=0, eval_every=4)

    def run(column: str) -> None:
        examples = read_examples(str(path), Columns(column))
        source = resolve_source(str(embedding_model))
        finetune(source, examples, examples, Run(tmp_path / "model"), optimisation=optimisation)

    _interrupt(monkeypatch, 6, lambda: run("x"))
    with pytest.raises(UserError, match="unfinished run of another command: data was"):
        run("y")


def test_two_processes_give_what_one_gives(
    tmp_path: Path, embedding_model: Path, texts: str, trained: Path
) -> None:
    output = tmp_path / "plugins"
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    launch += "--dynamo_backend no -m variator_export"
    result = subprocess.run(
        [sys.executable, "-m", *launch.split(), *_command(embedding_model, texts, output)],
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for ratio in ("ratio-2", "ratio-4"):
        two, one = load_plugin_config(output / ratio).training, load_plugin_config(trained / ratio).training
        assert two is not None
        assert one is not None
        assert (two["processes"], one["processes"]) == (2, 1)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        for name, array in _tensors(trained / ratio).items():
            np.testing.assert_allclose(_tensors(output / ratio)[name], array, rtol=2e-3, atol=2e-5)


def test_a_batch_that_processes_cannot_share_is_refused(
    tmp_path: Path, embedding_model: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "num_processes", lambda: 3)
    with pytest.raises(UserError, match="cannot be shared evenly by 3 processes") as error:
        _pretrain(embedding_model, texts, tmp_path / "plugins")
    assert error.value.hint == "--batch-size 3"


def test_training_stops_early_and_keeps_the_best(tmp_path: Path, embedding_model: Path, texts: str) -> None:
    result = _pretrain(
        embedding_model,
        texts,
        tmp_path / "plugins",
        optimisation={"steps": 400, "learning_rate": 0.5, "schedule": "constant", "patience": 2},
    )
    assert result.history.steps < 400
    best = min(result.history.held_out, key=lambda point: point.loss)
    assert result.history.best_step == best.step
    assert result.losses["ratio-4"] == best.metrics["ratio-4"]


def test_a_run_that_diverges_says_so(tmp_path: Path, embedding_model: Path, texts: str) -> None:
    with pytest.raises(UserError, match="diverged") as error:
        _pretrain(
            embedding_model,
            texts,
            tmp_path / "plugins",
            optimisation={"learning_rate": 1e30, "warmup_steps": 0},
        )
    assert error.value.hint is not None
    assert "--learning-rate" in error.value.hint
    assert not (tmp_path / "plugins").exists()


def test_what_is_there_is_not_replaced_unasked(
    tmp_path: Path, embedding_model: Path, texts: str, trained: Path
) -> None:
    with pytest.raises(UserError, match="is there already"):
        _pretrain(embedding_model, texts, trained)
    (tmp_path / "thesis.txt").write_text("Ten years of work.")
    with pytest.raises(UserError, match="holds files that no training run wrote"):
        _pretrain(embedding_model, texts, tmp_path, replace=True)
    assert (tmp_path / "thesis.txt").exists()
    mixed = tmp_path / "mixed"
    shutil.copytree(trained, mixed)
    (mixed / "ratio-2" / "notes.txt").write_text("Mine.")
    with pytest.raises(UserError, match="holds files that no training run wrote"):
        _pretrain(embedding_model, texts, mixed, replace=True)
    (mixed / "ratio-2" / "notes.txt").unlink()
    _pretrain(embedding_model, texts, mixed, replace=True, optimisation={"steps": 2})
    with pytest.raises(UserError, match="is a file"):
        _pretrain(embedding_model, texts, tmp_path / "thesis.txt", replace=True)


def test_a_run_does_not_replace_what_it_reads(tmp_path: Path, classifier: Path, trained: Path) -> None:
    plugins, model = tmp_path / "plugins", tmp_path / "model"
    shutil.copytree(trained, plugins)
    shutil.copytree(classifier, model)
    data = _task(tmp_path / "train.tsv")
    for output in (plugins, model):
        command = (
            f"train adapt --backbone {model} --plugin {plugins}/ratio-2 --data {data} --text-column sentence"
        )
        with pytest.raises(UserError, match="which the run reads"):
            make_app()([*command.split(), "--output", str(output), "--replace"], standalone_mode=False)
    assert (model / "model.safetensors").is_file()


def test_a_plugin_without_decompression_stays_without(
    tmp_path: Path, embedding_model: Path, texts: str
) -> None:
    result = _pretrain(
        embedding_model, texts, tmp_path / "plugins", shape={"ratios": (2,), "decompression": False}
    )
    for name, array in _tensors(result.folders["ratio-2"]).items():
        assert array.any() == ("compress.weight" in name or "compress.bias" in name), name
    adapted = _pretrain_further(result.folders["ratio-2"], embedding_model, texts, tmp_path / "adapted")
    for name, array in _tensors(adapted).items():
        assert array.any() == ("compress.weight" in name or "compress.bias" in name), name


def _pretrain_further(plugin: Path, backbone: Path, texts: str, output: Path) -> Path:
    lines = read_texts([texts])[0].documents[0].splitlines()
    data = output.parent / "lines.tsv"
    data.write_text("text\n" + "\n".join(line.replace("\t", " ") for line in lines if line.strip()) + "\n")
    examples = read_examples(str(data), Columns(target=None))
    result = adapt(
        _load(backbone),
        {"ratio-2": plugin},
        examples,
        examples,
        Run(output),
        losses=Losses(),
        optimisation=Optimisation(steps=4, batch_size=4, learning_rate=1e-2, warmup_steps=0),
        max_tokens=24,
    )
    return result.folders["ratio-2"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"passages": PassageSettings(max_tokens=65)}, "longer than the backbone's limit of 64"),
        ({"losses": Losses(hidden=0, logits=1)}, "needs a classifier"),
        ({"losses": Losses(label=1)}, "which plain text does not have"),
        ({"shape": {"ratios": (32,)}}, "exceeds the 24 tokens of the longest"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, embedding_model: Path, texts: str, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as error:
        _pretrain(embedding_model, texts, tmp_path / "plugins", **options)
    assert expected in error.value.message


def test_too_little_text_is_refused(tmp_path: Path, embedding_model: Path) -> None:
    (tmp_path / "a.txt").write_text("Short. Very short.")
    with pytest.raises(UserError, match="tokens to train on"):
        _pretrain(embedding_model, str(tmp_path / "a.txt"), tmp_path / "plugins")
    (tmp_path / "b.jsonl").write_text('{"text": "One sentence with no end"}\n' * 9)
    with pytest.raises(UserError, match="No document is long enough to hold out its end"):
        _pretrain(embedding_model, str(tmp_path / "b.jsonl"), tmp_path / "plugins")


def test_passages_are_the_same_for_a_seed_and_cut_from_the_text(embedding_model: Path, texts: str) -> None:
    encoder = TextEncoder(embedding_model)
    train, held_out = tokenize_documents(read_texts([texts]), encoder, PASSAGES)
    assert sum(len(d.ids) for p in held_out for d in p.documents) < 0.2 * sum(
        len(d.ids) for p in train for d in p.documents
    )

    def make(seed: int, noise: float = 0.0) -> list[list[int]]:
        settings = PASSAGES.model_copy(update={"noise": noise})
        passages = Passages(train, encoder, settings, batch_size=4, num_batches=5, seed=seed)
        return [list(row.ids) for row, _ in passages]

    rows = make(0)
    assert rows == make(0) != make(1)
    assert all(row[0] == 101 and row[-1] == 102 and len(row) <= 24 for row in rows)
    whole = " ".join(f" {' '.join(map(str, d.ids))} " for p in train for d in p.documents)
    assert all(f" {' '.join(map(str, row[1:-1]))} " in whole for row in rows)
    changed = [
        (a, b) for x, y in zip(rows, make(0, noise=0.2), strict=True) for a, b in zip(x, y, strict=True)
    ]
    share = sum(a != b for a, b in changed) / len(changed)
    assert 0.1 < share < 0.3


def test_tokens_are_those_of_the_whole_text(tmp_path: Path, embedding_model: Path) -> None:
    text = '"I will go." She left. (Maybe.) Then\n\nA heading\n\nThe end; really: yes!'
    (tmp_path / "a.txt").write_text(text * 40)
    encoder = TextEncoder(embedding_model)
    train, held_out = tokenize_documents(read_texts([str(tmp_path / "a.txt")]), encoder, PASSAGES)
    documents = [train[0].documents[0], held_out[0].documents[0]]
    joined = [i for document in documents for i in document.ids.tolist()]
    assert joined == encoder.encode_plain([text * 40])[0][0]
    first = documents[0]
    ends = {int(first.ids[start - 1]) for start in first.starts[1:]}
    marks = {encoder.encode_plain([mark])[0][0][0] for mark in '".);:!'}
    assert ends <= marks | {
        encoder.encode_plain(["then"])[0][0][0],
        encoder.encode_plain(["heading"])[0][0][0],
    }
    assert len(first.starts) > 100


def test_text_is_mixed_by_shares(tmp_path: Path, embedding_model: Path, texts: str) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": f"Number {i}."}) + "\n" for i in range(200)))
    encoder = TextEncoder(embedding_model)
    number = encoder.encode_plain(["number"])[0][0][0]
    train, held_out = tokenize_documents(read_texts([texts, f"{short}@0.75"]), encoder, PASSAGES)
    # Of many short documents some are held out whole.
    assert [len(pool.documents) for pool in (train[1], held_out[1])] == [180, 20]
    passages = Passages(train, encoder, PASSAGES, batch_size=2, num_batches=400, seed=0)
    share = sum(row.ids[1] == number and len(row.ids) < 8 for row, _ in passages) / len(passages)
    assert 0.7 < share < 0.8
    with pytest.raises(UserError, match=r"add up to 1\.5"):
        read_texts([f"{texts}@0.75", f"{short}@0.75"])
    with pytest.raises(UserError, match="leave something"):
        read_texts([texts, f"{short}@1"])
    with pytest.raises(UserError, match="not between 0 and 1"):
        read_texts([f"{short}@2"])


def test_padding_counts_in_no_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 3, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = 0.5 * ((student - teacher)[0, :3].square().mean() + (student - teacher)[1].square().mean())
    assert float(losses.hidden_loss(student, teacher, mask).mean()) == pytest.approx(
        float(expected), rel=1e-6
    )
    student[0, 3:] = 1e6
    assert float(losses.hidden_loss(student, teacher, mask).mean()) == pytest.approx(
        float(expected), rel=1e-6
    )


def test_no_row_depends_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 5, 3, generator=generator) for _ in range(2))
    teacher[2] *= 100
    mask = torch.ones(4, 5)
    labels = torch.tensor([0, 2, 1, 1])
    whole = [
        losses.hidden_loss(student, teacher, mask),
        losses.relative_hidden_loss(student, teacher, mask),
        losses.embedding_loss(student[:, 0], teacher[:, 0]),
        losses.logits_loss(student[:, 0], teacher[:, 0]),
        losses.label_loss(student[:, 0], labels),
    ]
    alone = [
        losses.hidden_loss(student[1:2], teacher[1:2], mask[:1]),
        losses.relative_hidden_loss(student[1:2], teacher[1:2], mask[:1]),
        losses.embedding_loss(student[1:2, 0], teacher[1:2, 0]),
        losses.logits_loss(student[1:2, 0], teacher[1:2, 0]),
        losses.label_loss(student[1:2, 0], labels[1:2]),
    ]
    for first, second in zip(whole, alone, strict=True):
        torch.testing.assert_close(first[1:2], second)


# A task that a small model learns: which of two words is in the text.
def _task(path: Path, count: int = 64) -> Path:
    rng = np.random.default_rng(0)
    words = ["river", "table", "seven", "cloud", "paper", "green"]
    lines = ["sentence\tlabel"]
    for _ in range(count):
        label = int(rng.integers(2))
        chosen = [*rng.choice(words, 4), ("winter", "summer")[label]]
        rng.shuffle(chosen)
        lines.append(f"{' '.join(chosen)}\t{('cold', 'warm')[label]}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def classifier(artefacts: Artefacts, embedding_model: Path) -> Path:
    """The small BERT, fine-tuned to tell two words apart."""
    return artefacts.folder("task", lambda folder: _finetune(embedding_model, folder)) / "classifier"


def _finetune(embedding_model: Path, folder: Path) -> None:
    examples = read_examples(str(_task(folder / "train.tsv")), Columns("sentence"))
    result = finetune(
        resolve_source(str(embedding_model)),
        examples,
        examples,
        Run(folder / "classifier"),
        optimisation=Optimisation(
            steps=60, batch_size=16, learning_rate=3e-3, warmup_steps=0, eval_every=20, weight_decay=0.0
        ),
    )
    assert result.accuracy == 1.0


def test_fine_tuning_writes_a_classifier_that_names_its_classes(classifier: Path) -> None:
    config = json.loads((classifier / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "cold", "1": "warm"}
    record = json.loads((classifier / "training.json").read_text())
    assert record["held_out"]["accuracy"] == 1.0
    assert (classifier / "tokenizer.json").is_file()


def test_plugins_are_adapted_to_a_task_with_and_without_labels(
    tmp_path: Path, classifier: Path, trained: Path
) -> None:
    data = _task(tmp_path / "train.tsv")
    command = (
        f"train adapt --backbone {classifier} --plugin {trained}/ratio-2 --plugin slow={trained}/ratio-4 "
        f"--data {data} --text-column sentence --held-out 0.25 --steps 20 --batch-size 8 --eval-every 10 "
        "--learning-rate 1e-2 --precision float32"
    ).split()
    make_app()([*command, "--output", str(tmp_path / "plain")], standalone_mode=False)
    config = load_plugin_config(tmp_path / "plain" / "slow")
    assert config.backbone is not None
    assert config.backbone.weights_sha256 == resolve_source(str(classifier)).weights_sha256
    assert config.training is not None
    assert (config.training["stage"], config.training["parent"]["name"]) == ("adaptation", "slow")
    labelled = [*command, "--loss", "label=1", "--loss", "logits=1", "--label-column", "label"]
    make_app()([*labelled, "--output", str(tmp_path / "labelled")], standalone_mode=False)
    for name in ("ratio-2", "slow"):
        first, second = _tensors(tmp_path / "plain" / name), _tensors(tmp_path / "labelled" / name)
        assert any(not np.array_equal(first[key], second[key]) for key in first)


def test_plugins_are_trained_further_on_other_text(
    tmp_path: Path, embedding_model: Path, trained: Path
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text((REPOSITORY / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    command = (
        f"train pretrain --text {text} --plugin {trained}/ratio-2 --plugin slow={trained}/ratio-4 "
        f"--backbone {embedding_model} --min-tokens 6 --max-tokens 24 --held-out 0.2 --held-out-passages 16 "
        "--batch-size 8 --precision float32 --dtype float32 --warmup-steps 0 --learning-rate 1e-2"
    ).split()
    still = tmp_path / "still"
    still_command = [*command, "--steps", "1", "--output", str(still)]
    still_command[still_command.index("1e-2")] = "1e-12"
    make_app()(still_command, standalone_mode=False)
    for name, begun in (("ratio-2", "ratio-2"), ("slow", "ratio-4")):  # it begins with what was given
        found, expected = _tensors(still / name), _tensors(trained / begun)
        for key, array in expected.items():
            np.testing.assert_allclose(found[key], array.astype(np.float32), rtol=0, atol=1e-9)
    further = tmp_path / "further"
    make_app()(
        [*command, "--steps", "40", "--eval-every", "10", "--output", str(further)], standalone_mode=False
    )
    before, after = load_plugin_config(still / "slow").training, load_plugin_config(further / "slow").training
    assert before is not None
    assert after is not None
    assert after["loss"] < 0.9 * before["loss"]
    assert after["parent"]["training"]["steps"] == 12
    assert load_plugin_config(further / "slow").bottleneck_size == 8
    card = (further / "slow" / "README.md").read_text(encoding="utf-8")
    assert "mine.txt" in card.split("## Previous run")[0]
    assert "12 steps of 4 texts" in card.split("## Previous run")[1]
    assert "recipes.txt" in card.split("## Previous run")[1]  # what the plugin learnt from stays named


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "There is no text to train on"),
        ("--text {texts}", "There is no ratio"),
        ("--text {texts} --plugin p --masking none", "--masking is for new plugins"),
        ("--text {texts} --plugin p --ratio 2", "--ratio is for new plugins"),
        ("--text {texts} --plugin nowhere", "nowhere"),
        ("--text {texts} --ratio 1", "Ratio 1 compresses nothing"),
        ("--text {texts} --ratio x", "The ratio 'x' is not a whole number"),
        ("--text {texts} --ratio 2 --preset papr", "--preset 'papr' is not one of default, paper"),
        ("--text {texts} --ratio 2 --masking some", "--masking is 'some'"),
        ("--text {texts} --ratio 2 --min-tokens 40 --max-tokens 30", "min_tokens 40 is more than"),
        ("--text {texts} --ratio 2 --noise 0.9", "--noise is 0.9"),
        ("--text {texts} --ratio 2 --loss nothing=1", "no loss term 'nothing'"),
        ("--text {texts} --ratio 2 --loss hidden --loss hidden=2", "was given twice"),
        ("--text {texts} --ratio 2 --dtype int8", "--dtype 'int8' is not one of float16, float32"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(
    tmp_path: Path, texts: str, arguments: str, expected: str
) -> None:
    command = ["train", "pretrain", *arguments.format(texts=texts).split(), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError) as error:
        make_app()(command, standalone_mode=False)
    assert expected in error.value.message
    assert error.value.hint


def test_adaptation_refuses_what_does_not_fit(tmp_path: Path, classifier: Path, trained: Path) -> None:
    data = _task(tmp_path / "train.tsv")
    arguments = ["train", "adapt", "--backbone", str(classifier), "--data", str(data)]
    arguments += ["--output", str(tmp_path / "out"), "--text-column", "sentence"]
    plugin = ["--plugin", str(trained / "ratio-2")]
    for extra, expected in [
        ([], "There is no plugin to train"),
        ([*plugin, *plugin], "Two plugins have the name ratio-2"),
        ([*plugin, "--loss", "label"], "needs labels"),
        ([*plugin, "--loss", "lable=1"], "no loss term 'lable'"),
        ([*plugin, "--loss", "hidden=much"], "is not a number"),
        ([*plugin, "--loss", "hidden=0"], "every term of the loss has the weight 0"),
        ([*plugin, "--held-out", "0.001"], "holds out no example"),
        ([*plugin, "--loss", "embedding=1"], "declares no pooling"),
        ([*plugin, "--learning-rate", "0"], "--learning-rate is 0"),
        ([*plugin, "--held-out", "0.9"], "is not above 0 and at most 0.5"),
        ([*plugin, "--loss", "hidden="], "is not a number"),
        (["--plugin", f"a/b={trained / 'ratio-2'}"], "cannot be a name"),
        ([*plugin, "--loss", "layers=1"], "whose plugin would not be trained"),
        ([*plugin, "--precision", "int8"], "--precision 'int8' is not one of"),
    ]:
        with pytest.raises(UserError) as error:
            make_app()([*arguments, *extra], standalone_mode=False)
        assert expected in error.value.message
    other = tmp_path / "other"
    shutil.copytree(trained / "ratio-2", other)
    config = json.loads((other / "plugin_config.json").read_text())
    from variator_export.model.plugin import initialise_plugin
    from variator_export.model.plugin_file import save_plugin

    save_plugin(initialise_plugin(2, 32, config["num_layers"] + 1), other)
    with pytest.raises(UserError, match="is for 3 layers of hidden size 32"):
        make_app()([*arguments, "--plugin", str(other)], standalone_mode=False)


def test_adaptation_knows_the_labels_of_its_classifier(
    tmp_path: Path, classifier: Path, trained: Path
) -> None:
    data = tmp_path / "train.tsv"
    data.write_text("text\tlabel\na\tcold\nb\twarm\nc\tmild\nd\tcold\n")
    examples = read_examples(str(data), Columns())
    with pytest.raises(
        UserError, match=r"line 4: the label 'mild' is not one of the classifier's: cold, warm"
    ):
        adapt(
            _load(classifier),
            {"ratio-2": trained / "ratio-2"},
            examples,
            examples,
            Run(tmp_path / "out"),
            losses=Losses(label=1),
            optimisation=Optimisation(steps=1, batch_size=2, learning_rate=1e-3),
        )


def test_every_class_is_trained_on(tmp_path: Path) -> None:
    data = tmp_path / "train.tsv"
    labels = ["common"] * 90 + ["rare"] * 9 + ["single"]
    data.write_text("text\tlabel\n" + "".join(f"text {i}\t{label}\n" for i, label in enumerate(labels)))
    train, held_out = divide(read_examples(str(data), Columns()), 0.2, seed=0)
    assert train.targets is not None
    assert held_out.targets is not None
    assert {label: train.targets.count(label) for label in set(labels)} == {
        "common": 72,
        "rare": 7,
        "single": 1,
    }
    assert set(held_out.texts) | set(train.texts) == {f"text {i}" for i in range(100)}
    assert not set(held_out.texts) & set(train.texts)


def test_a_family_without_a_classifier_cannot_be_fine_tuned(
    tmp_path: Path, small_model: Callable[[str], Path]
) -> None:
    data = _task(tmp_path / "train.tsv")
    arguments = ["train", "finetune", "--backbone", str(small_model("t5-v1.0")), "--data", str(data)]
    with pytest.raises(UserError, match="The family t5 has no classifier"):
        make_app()(
            [*arguments, "--text-column", "sentence", "--output", str(tmp_path / "out")],
            standalone_mode=False,
        )
