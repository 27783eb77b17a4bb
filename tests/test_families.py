"""The table of sites: what is in it, what is refused, and how one is added from outside."""

import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import copy_tokenizer, small_config

from variator_export.building.recipe_build import build
from variator_export.cli.recipe_flags import with_flags
from variator_export.core.errors import UserError
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.model.backbone import Backbone, read_backbone_info
from variator_export.model.families import (
    FAMILIES,
    architectures,
    find_architecture,
    find_task,
)
from variator_export.model.source import resolve_source
from variator_export.quality.evaluation import evaluate
from variator_export.recipe.recipe import Recipe
from variator_export.sessions import Bundle
from variator_export.training.distillation import check_losses
from variator_export.training.settings import Losses

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
        if name != "T5EncoderModel":  # which Optimum does not know by its class
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
    with pytest.raises(UserError, match="returns only outputs for each token"):
        evaluate([bundle], examples)
