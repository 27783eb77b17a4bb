"""The table of sites: what is in it, what is refused, and how one is added from outside."""

import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import MODELS, copy_tokenizer, small_config

from variator_export.building.evaluate import evaluate
from variator_export.building.recipe_build import build
from variator_export.cli.recipe_flags import with_flags
from variator_export.core.errors import UserError
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.engines.eager import EagerModel
from variator_export.model.backbone import Backbone, load_classifier
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.families import (
    FAMILIES,
    architectures,
    find_architecture,
    find_task,
)
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe import Recipe
from variator_export.sessions import Bundle
from variator_export.training.distillation import check_losses
from variator_export.training.settings import Losses
from variator_export.verification.bundle_verification import verify
from variator_export.verification.eager_bundle import load_bundle_backbone
from variator_export.verification.invariances import PADDING

PAGE = Path(__file__).parent.parent / "docs" / "families.md"


def _block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def _distribution(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, entry: str) -> None:
    """Something installed, as the package index would leave it."""
    (folder / "my_families.py").write_text(module)
    info = folder / "my_families-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-families\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{FAMILIES.group}]\n{entry}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_families", raising=False)


def test_the_page_on_families_adds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minilm_folder: Path
) -> None:
    entries = tomllib.loads(_block("toml"))["project"]["entry-points"][FAMILIES.group]
    ((name, value),) = entries.items()
    _distribution(tmp_path, monkeypatch, _block("python"), f"{name} = {value}")
    folder = tmp_path / "camembert"
    torch.manual_seed(0)
    config = small_config(transformers.CamembertConfig, type_vocab_size=1)
    transformers.CamembertForMaskedLM(config).save_pretrained(folder)
    copy_tokenizer(minilm_folder, folder)
    recipe = Recipe.model_validate(
        {
            "name": "mine",
            "backbone": {"source": str(folder), "architecture": "CamembertModel"},
            "plugins": [{"ratio": 3, "initialise": {"seed": 0}}],
            "speed": None,
        }
    )
    bundle = Bundle.load(build(recipe, tmp_path / "bundle").bundle)
    assert bundle.manifest.backbone.model_type == "camembert"
    inputs = bundle.text_encoder().encode(["The ferry leaves."], bundle.manifest.backbone.inputs, 63)
    assert bundle.session().run(inputs, ratio=3)["last_hidden_state"].shape[-1] == 32


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("X = 1", "is of type int, not Family"),
        ("import nothing_of_this_name", "cannot be loaded: ModuleNotFoundError"),
        ("from variator_export.model.families.bert import BERT as X", "which is already in the table"),
    ],
)
def test_a_broken_entry_point_names_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, expected: str
) -> None:
    _distribution(tmp_path, monkeypatch, module, "x = my_families:X")
    with pytest.raises(UserError, match=expected) as raised:
        find_architecture("BertModel")
    assert "my-families" in str(raised.value.hint)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_builds_and_verifies_with_a_plugin(bundle_of: Callable[[str], Bundle], name: str) -> None:
    """Its plugin reads padding, as plugins do by default."""
    bundle = bundle_of(name)
    varies = name.startswith("deberta")
    assert bundle.manifest.backbone.padding_states_vary == varies
    result = verify(bundle.path, [4], profile_shapes="none", seed=3)
    assert result.passed
    assert {f.question.case.split()[0] for f in result.findings["ratio-4"]} >= {"drawn", "a", "padding"}
    checks = {f.question.check for f in result.findings["ratio-4"]}
    left = {left.check for left in result.left_out.get("ratio-4", ())}
    assert (PADDING in checks, left) == (not varies, {PADDING} if varies else set())


def test_padding_changes_what_a_plugin_says_that_reads_it(bundle_of: Callable[[str], Bundle]) -> None:
    """In DeBERTa, in eager PyTorch too: so the check is left out, and the build says so."""
    bundle = bundle_of("deberta")
    inputs = bundle.text_encoder().encode(["The ferry leaves now."], bundle.manifest.backbone.inputs)
    padded = {key: np.pad(array, ((0, 0), (0, 9))) for key, array in inputs.items()}
    tokens = inputs["input_ids"].shape[1]
    eager = EagerModel.of_variant(load_bundle_backbone(bundle, None, ""), bundle, bundle.variant(4))
    for run in (eager.run, partial(bundle.session().run, ratio=4)):
        few, many = (run(arrays)["last_hidden_state"][:, :tokens] for arrays in (inputs, padded))
        assert np.abs(few - many).max() > 1e-3
    plain = [bundle.session().run(a)["last_hidden_state"][:, :tokens] for a in (inputs, padded)]
    assert np.abs(plain[0] - plain[1]).max() < 1e-4


def test_a_classifier_is_made_from_a_pre_training_checkpoint(tmp_path: Path, minilm_folder: Path) -> None:
    transformers.BertForPreTraining(small_config(transformers.BertConfig)).save_pretrained(tmp_path)
    copy_tokenizer(minilm_folder, tmp_path)
    made = load_classifier(resolve_source(str(tmp_path)), ["no", "yes"], 0)
    assert type(made.model).__name__ == "BertForSequenceClassification"
    assert made.left_out == ("cls",)


def test_the_page_lists_every_family() -> None:
    listed = set(re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == set(FAMILIES.own)


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        ("bert", {"is_decoder": True}, "it is a decoder"),
        ("electra", {"add_cross_attention": True}, "it is a decoder"),
        ("deberta", {"type_vocab_size": 2}, "it has token types"),
    ],
)
def test_what_a_family_cannot_do_is_refused_with_the_reason(
    small_model: Callable[[str], Path], tmp_path: Path, model: str, changes: dict[str, object], expected: str
) -> None:
    folder = tmp_path / model
    shutil.copytree(small_model(model), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=expected):
        read_backbone_info(resolve_source(str(folder)))


def test_the_nearest_family_is_named() -> None:
    with pytest.raises(UserError) as raised:
        find_architecture("DebertaV2ForMultipleChoice")
    assert "DebertaV2Model" in str(raised.value.hint)
    assert "DebertaModel" not in str(raised.value.hint)


def test_a_task_chooses_the_class(small_model: Callable[[str], Path]) -> None:
    source = resolve_source(str(small_model("electra")))
    assert read_backbone_info(source).spec.name == "ElectraForMaskedLM"
    assert read_backbone_info(source, task="feature-extraction").spec.name == "ElectraModel"
    with pytest.raises(UserError, match="electra does not support the task 'text-clasification'") as raised:
        read_backbone_info(source, task="text-clasification")
    assert raised.value.hint == "--task text-classification"
    assert find_task("T5ForConditionalGeneration", "feature-extraction").name == "T5EncoderModel"
    with pytest.raises(UserError, match="GPT2LMHeadModel is not supported"):
        find_task("GPT2LMHeadModel", "feature-extraction")


def test_tasks_are_named_as_optimum_names_them() -> None:
    from optimum.exporters.tasks import TasksManager

    for name, architecture in architectures().items():
        if architecture.head.generates:  # Optimum finds BART's class under two tasks, and takes the first
            assert architecture.head.task in TasksManager.get_all_tasks()
        elif name not in ("T5EncoderModel", "MT5EncoderModel"):  # which Optimum does not know by their class
            assert TasksManager.infer_task_from_model(getattr(transformers, name)) == architecture.head.task


def test_the_command_takes_a_task(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    folder = str(small_model("electra"))
    recipe = with_flags(
        "minilm",
        ratios=["1"],
        backbone=folder,
        task="feature-extraction",
        targets=["onnxruntime"],
        output=output,
        speed=False,
    ).recipe
    backbone = Bundle.load(build(recipe, output).bundle).manifest.backbone
    assert (backbone.architecture, backbone.task) == ("ElectraModel", "feature-extraction")


def test_logits_of_tokens_are_no_class_of_a_text(
    small_model: Callable[[str], Path], load_model: Callable[[str], Backbone], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="RobertaForTokenClassification without logits of each text"):
        check_losses(load_model("roberta"), Losses(logits=1))
    recipe = Recipe.model_validate(
        {
            "name": "tokens",
            "backbone": {"source": str(small_model("roberta"))},
            "plugins": [{"ratio": 2, "initialise": {"seed": 0}}],
            "speed": None,
        }
    )
    bundle = build(recipe, tmp_path / "tokens").bundle
    (tmp_path / "data.tsv").write_text("text\tlabel\nOne.\ta\nTwo.\tb\n")
    examples = read_examples(str(tmp_path / "data.tsv"), Columns("text", None, "label"))
    with pytest.raises(UserError, match="the label 'a' is not one of the classifier's: LABEL_0"):
        evaluate([bundle], examples)
