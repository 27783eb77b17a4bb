"""Training of plugins for models that generate text."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call
from conftest import plugin_for
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch.nn import functional

from variator_export import Bundle, build
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.model.augmented import AugmentedModel
from variator_export.model.backbone import Backbone
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_file import load_plugin_config, save_plugin
from variator_export.recipe.recipe import Recipe
from variator_export.text.tokenizer import TextEncoder
from variator_export.training.adapt import adapt
from variator_export.training.batches import collate_items
from variator_export.training.distillation import Distillation
from variator_export.training.passages import corrupt
from variator_export.training.run import Run
from variator_export.training.settings import Losses, Optimisation
from variator_export.training.task_data import divide

REPOSITORY = Path(__file__).parent.parent
TEXTS = ["The ferry to the island leaves at seven.", "Yes.", "She had kept every letter he wrote."]
RIGHT = ["seven", "it does leave then", "letters"]


@pytest.fixture(scope="session")
def t5_with_sentinels(small_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small T5, whose tokenizer has T5's tokens for spans that are left out."""
    folder = tmp_path_factory.mktemp("t5") / "model"
    shutil.copytree(small_model("t5-gated-text"), folder)
    path = folder / "tokenizer.json"
    path.write_text(re.sub(r"\[unused(\d+)\]", r"<extra_id_\1>", path.read_text()))
    return folder


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with their target texts, no two of which are alike."""
    path = tmp_path_factory.mktemp("table") / "pairs.jsonl"
    rows = [{"text": f"Row {i}: {TEXTS[i % 3]}", "label": f"{RIGHT[i % 3]} {i}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(st.integers(1, 60), st.floats(0.01, 0.5), st.integers(0, 10_000), st.integers(2, 30))
@settings(deadline=None)
def test_left_out_spans_give_the_passage_back(length: int, share: float, seed: int, count: int) -> None:
    ids, sentinels = np.arange(1000, 1000 + length), list(range(count))
    source, target = corrupt(ids, sentinels, share, np.random.default_rng(seed))
    spans: dict[int, list[int]] = {}
    for token in target:
        if token < 1000:
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    rebuilt = [token for item in source for token in (spans[item] if item < 1000 else [item])]
    assert rebuilt == ids.tolist()
    used = [token for token in source if token < 1000]
    assert used == sentinels[: len(used)], "in order"
    assert target[-1] == sentinels[len(used)], "a last sentinel ends the spans"
    left_out = sum(token >= 1000 for token in target)
    if length > 1:
        assert left_out == min(max(round(length * share), 1), length - 1)
        assert all(spans[token] for token in used), "no span is empty"


def _batch(backbone: Backbone) -> dict[str, torch.Tensor]:
    encoder = TextEncoder(backbone.info.source.folder)
    rows = encoder.token_rows(TEXTS)
    return collate_items(backbone)(
        [(row, t.ids) for row, t in zip(rows, encoder.token_rows(RIGHT), strict=True)]
    )


@pytest.mark.parametrize("name", ["t5-text", "bart-text", "pegasus-text", "mbart-text"])
def test_terms_of_the_decoder_are_those_of_transformers(
    load_model: Callable[..., Backbone], name: str
) -> None:
    """Computed anew, row by row and without padding, from transformers' models."""
    backbone = load_model(name)
    plugin = CompressionPlugin.from_file(plugin_for(backbone, 3, masking="exclude-padding"))
    batch = _batch(backbone)
    assert (batch["labels"] == -100).any()
    found = {
        term: Distillation(backbone, {"p": plugin}, Losses.model_validate({"hidden": 0, term: 1}))(**batch)
        for term in ("decoder", "logits", "label")
    }
    student = AugmentedModel(backbone, plugin)
    for row in range(len(TEXTS)):
        length, tokens = int(batch["attention_mask"][row].sum()), int((batch["labels"][row] != -100).sum())
        inputs = {key: batch[key][row : row + 1, :length] for key in ("input_ids", "attention_mask")}
        labels = batch["labels"][row : row + 1, :tokens]
        with torch.inference_mode():
            teacher = backbone.model(**inputs, labels=labels, output_hidden_states=True)
            states = student(inputs)["last_hidden_state"]
            outputs = student.transformer(
                encoder_outputs=(states,),
                attention_mask=inputs["attention_mask"],
                labels=labels,
                output_hidden_states=True,
            )
        expected = {
            "decoder": functional.mse_loss(
                outputs.decoder_hidden_states[-1], teacher.decoder_hidden_states[-1]
            ),
            "logits": functional.kl_div(
                outputs.logits[0].log_softmax(-1),
                teacher.logits[0].log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            ),
            "label": outputs.loss,
        }
        for term, value in expected.items():
            assert float(value) > 0
            torch.testing.assert_close(found[term]["metrics"][row, 0], value, rtol=2e-4, atol=1e-7)


def test_only_the_plugin_is_trained_and_the_decoder_helps(
    load_model: Callable[..., Backbone], table: Path, tmp_path: Path
) -> None:
    backbone = load_model("bart-text")
    before = {name: tensor.clone() for name, tensor in backbone.state.items()}
    save_plugin(plugin_for(backbone, 2), tmp_path / "plugin")
    examples = divide(read_examples(str(table), Columns()), 0.2, 0, by_class=False)
    result = adapt(
        backbone,
        {"ratio-2": tmp_path / "plugin"},
        *examples,
        Run(tmp_path / "adapted"),
        losses=Losses(hidden=0, decoder=1),
        optimisation=Optimisation(steps=60, batch_size=8, learning_rate=2e-2, warmup_steps=2, eval_every=5),
    )
    losses = [point.metrics["ratio-2"] for point in result.history.held_out]
    assert losses[-1] < 0.8 * losses[0]
    for name, tensor in backbone.state.items():
        assert torch.equal(tensor, before[name]), name
    record = load_plugin_config(tmp_path / "adapted" / "ratio-2").training
    assert record is not None
    assert record["settings"]["max_target_tokens"] == 64, "the decoder's own limit"
    assert record["settings"]["losses"]["decoder"] == 1


def test_pretraining_of_t5_has_the_paper_s_two_losses(t5_with_sentinels: Path, tmp_path: Path) -> None:
    output = tmp_path / "plugins"
    text = REPOSITORY / "docs" / "serving.md"
    shutil.copyfile(text, tmp_path / "text.txt")
    command = [
        *("train", "pretrain", "--backbone", t5_with_sentinels, "--text", tmp_path / "text.txt"),
        *("--ratio", "2", "--min-tokens", "6", "--max-tokens", "24", "--held-out", "0.1", "--steps", "30"),
        *("--held-out-passages", "16", "--batch-size", "4", "--eval-every", "10", "--output", output),
        *("--precision", "float32"),
    ]
    done = call(*map(str, command))
    assert done.returncode == 0, done.stderr
    settings = (load_plugin_config(output / "ratio-2").training or {})["settings"]
    assert (settings["losses"]["hidden"], settings["losses"]["decoder"]) == (1, 1)
    assert settings["losses"]["embedding"] == 0
    assert settings["passages"]["corruption"] == 0.15
    plain = call(
        *map(str, (*command[:-4], "--corruption", "0", "--precision", "float32", "--output", tmp_path / "p"))
    )
    assert plain.returncode == 0, plain.stderr
    without = (load_plugin_config(tmp_path / "p" / "ratio-2").training or {})["settings"]
    assert (without["losses"]["decoder"], without["passages"]["corruption"]) == (0, 0)
    # The plugin belongs to the model, and a build takes it.
    recipe = {
        "name": "trained",
        "backbone": {"source": str(t5_with_sentinels)},
        "plugins": [{"source": str(output / "ratio-2")}],
        "targets": ["onnxruntime"],
        "speed": None,
    }
    bundle = Bundle.load(build(Recipe.model_validate(recipe), tmp_path / "bundle").bundle)
    assert isinstance(bundle.generate("The ferry leaves.", 2, max_new_tokens=3), str)


def test_what_cannot_be_trained_is_refused(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The ferry leaves at seven. It is late.\n" * 50)
    pretrain = ("train", "pretrain", "--text", tmp_path / "text.txt", "--ratio", "2", "--max-tokens", "16")
    bart, bert = small_model("bart-text"), small_model("bert")
    new = ("--output", tmp_path / "new")
    for arguments, words in (
        ((*pretrain, "--backbone", bart, "--loss", "decoder=1"), "need a target text"),
        ((*pretrain, "--backbone", bart, "--corruption", "0.15"), "no tokens for spans"),
        ((*pretrain, "--backbone", bert, "--loss", "decoder=1"), "needs a decoder"),
        ((*pretrain, "--backbone", bert, "--corruption", "0.9"), "corruption"),
    ):
        refused = call(*map(str, (*arguments, *new)))
        assert refused.returncode in (1, 2), arguments
        assert words in refused.stderr, refused.stderr
    assert not (tmp_path / "new").exists()


def test_adaptation_reads_the_right_texts(
    small_model: Callable[[str], Path], load_model: Callable[..., Backbone], table: Path, tmp_path: Path
) -> None:
    def adapted(name: str, *options: str) -> object:
        folder = tmp_path / name
        save_plugin(plugin_for(load_model(name), 2), folder)
        return call(
            *(
                "train",
                "adapt",
                "--backbone",
                str(small_model(name)),
                "--plugin",
                str(folder),
                "--data",
                str(table),
            ),
            *(
                "--steps",
                "2",
                "--batch-size",
                "4",
                "--held-out",
                "0.1",
                "--output",
                str(tmp_path / f"{name}-new"),
            ),
            *options,
        )

    done = adapted("bart-text", "--label-column", "label", "--max-target-tokens", "5")
    assert done.returncode == 0, done.stderr
    record = load_plugin_config(tmp_path / "bart-text-new" / "ratio-2").training or {}
    assert record["settings"]["losses"] | {"hidden": 1, "decoder": 1} == record["settings"]["losses"]
    assert record["settings"]["max_target_tokens"] == 5
    missing = adapted("t5-text")
    assert (missing.returncode, "need the target texts" in missing.stderr) == (1, True), missing.stderr
    language = adapted("mbart-text", "--label-column", "label")
    assert (language.returncode, "the code of their language" in language.stderr) == (1, True)
    without = adapted("mbart-text", "--loss", "hidden=1")
    assert without.returncode == 0, without.stderr


def test_released_plugins_of_the_authors_are_imported_for_text(
    load_model: Callable[..., Backbone], tmp_path: Path
) -> None:
    """Their files hold the encoder's plugins alone; the backbone is the whole T5."""
    backbone = load_model("t5-text")
    plugin = plugin_for(backbone, 4)
    names = {
        "compress.weight": "mux_layer.weight",
        "compress.bias": "mux_layer.bias",
        "decompress.down.weight": "demux_adapter.w_in.weight",
        "decompress.down.bias": "demux_adapter.w_in.bias",
        "decompress.up.weight": "demux_adapter.w_out.weight",
        "decompress.up.bias": "demux_adapter.w_out.bias",
    }
    state = {}
    for name, array in plugin.tensors.items():
        layer, _, kind = name.removeprefix("layers.").partition(".")
        state[f"mux_layer.{layer}.{names[kind]}"] = torch.from_numpy(array.copy()).half()
    torch.save(state, tmp_path / "released.pkl")
    folder = backbone.info.source.folder
    imported = call(
        *("import", str(tmp_path / "released.pkl"), "--backbone", str(folder)),
        *("--output", str(tmp_path / "plugin")),
    )
    assert imported.returncode == 0, imported.stderr
    found = load_file(tmp_path / "plugin" / "plugin.safetensors")
    for name, array in plugin.tensors.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float16))
    built = call(
        *(
            "build",
            "--backbone",
            str(folder),
            "--plugin",
            str(tmp_path / "plugin"),
            "--target",
            "onnxruntime",
        ),
        *("--output", str(tmp_path / "bundle")),
    )
    assert built.returncode == 0, built.stderr
    assert Bundle.load(tmp_path / "bundle").session().ratios == (1, 4)
