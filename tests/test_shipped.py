"""The recipes of the package, and the default one's plugins on sentence pairs written for these tests."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from artefacts import Artefacts
from command_line import call_process
from conftest import copy_tokenizer, small_config
from stand_in_hub import serve

from variator_export.building.evaluate import evaluate
from variator_export.building.plan import select_plugins
from variator_export.building.recipe_build import build
from variator_export.bundle.manifest import read_manifest
from variator_export.core.errors import UserError
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.model.card import CARD_NAME, PLOT_NAME
from variator_export.model.modular.weights import load_modules
from variator_export.model.plugin_file import load_plugin
from variator_export.model.source import modules_folder, plugin_folder, resolve_source
from variator_export.recipe.recipe_file import load_recipe, shipped_recipes
from variator_export.recipe.recipes_folder import recipes_folder
from variator_export.sessions import Bundle

PAIRS = Path(__file__).parent / "data" / "sentence_pairs.tsv"
# Passages of novels that neither model nor plugins were trained on, made by examples/t5-demo/make_data.py.
PASSAGES = Path(__file__).parent / "data" / "t5_demo.jsonl"
RATIOS = (2, 4, 8)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("recipe", "stage"), [("minilm", "pretrain"), ("t5-demo", "adapt")])
def test_a_shipped_plugin_says_how_it_was_made(recipe: str, stage: str, ratio: int) -> None:
    folder = plugin_folder(f"recipes:{recipe}/ratio-{ratio}")
    plugin = load_plugin(folder)
    assert plugin.config.ratio == ratio
    assert {array.dtype for array in plugin.tensors.values()} == {np.dtype(np.float16)}
    backbone = plugin.config.backbone
    assert backbone is not None
    assert backbone.weights_sha256 == load_recipe(recipe).backbone.sha256
    training = plugin.config.training
    assert training is not None
    assert training["command"].startswith(f"variator-export train {stage}")
    assert training["terms"]
    card = (folder / CARD_NAME).read_text()
    assert training["command"] in card
    assert all(source["name"] in card for source in training["data"])
    assert f"| ratio-{ratio} |" in card  # its measured quality
    assert (folder / PLOT_NAME).is_file()


def test_shipped_plugins_keep_what_the_model_says(minilm_bundle: Path) -> None:
    examples = read_examples(str(PAIRS), Columns("first", "second", "score"))
    quality = evaluate([minilm_bundle], examples)
    assert set(quality.agreement) == {"ratio-1", *(f"ratio-{k}" for k in RATIOS)}
    found = {row.ratio: row for row in quality.rows if row.runtime == "onnxruntime"}
    # An untrained plugin of ratio 4 has a cosine of 0.3 and loses half of the correlation.
    for ratio, cosine, lost in ((2, 0.93, 0.05), (4, 0.88, 0.08), (8, 0.84, 0.12)):
        assert float(found[ratio].metrics["cosine"] or 0) >= cosine
        assert float(found[ratio].relative_loss or 0) <= lost
    assert found[1].relative_loss == 0


@pytest.mark.parametrize("granularity", [2, 3])
def test_shipped_modules_say_how_they_were_made(granularity: int) -> None:
    folder = modules_folder(f"recipes:minilm/g{granularity}")
    modules = load_modules(folder)
    config = modules.config
    assert (config.granularity, len(config.modules)) == (granularity, 6 // granularity)
    assert {tensor.dtype for tensor in modules.tensors.values()} == {torch.float16}
    assert config.backbone is not None
    assert config.backbone.weights_sha256 == load_recipe("minilm-modular").backbone.sha256
    assert config.training is not None
    card = (folder / CARD_NAME).read_text()
    assert config.training["command"].startswith("variator-export train modules")
    assert config.training["command"] in card
    assert all(source["name"] in card for source in config.training["data"])
    assert "| enc-2x3 |" in card  # measured quality
    assert (folder / PLOT_NAME).is_file()


def test_shipped_modules_keep_what_the_model_says() -> None:
    examples = read_examples(str(PAIRS), Columns("first", "second", "score"))
    folders = [modules_folder(f"recipes:minilm/g{granularity}") for granularity in (2, 3)]
    quality = evaluate(folders, examples, runtimes=("onnxruntime",))
    found = {row.variant: row for row in quality.rows}
    for variant, cosine, lost in (("enc-2x3", 0.90, 0.05), ("enc-3x2", 0.85, 0.08)):
        assert float(found[variant].metrics["cosine"] or 0) >= cosine
        assert float(found[variant].relative_loss or 0) <= lost


def test_a_plugin_that_is_not_shipped_is_refused_with_those_that_are() -> None:
    with pytest.raises(UserError, match="The package has no plugin recipes:minilm/ratio-3") as error:
        plugin_folder("recipes:minilm/ratio-3")
    assert "recipes:minilm/ratio-4" in str(error.value)
    with pytest.raises(UserError, match="The package has no plugin"):
        plugin_folder("recipes:../minilm")


def test_tables_in_the_docs_are_made_of_the_committed_results() -> None:
    code = "import pages; assert all(p.read_text(encoding='utf-8') == c for p, c in pages.current().items())"
    folder = Path(__file__).parent.parent / "benchmarks"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, "python benchmarks/pages.py writes them\n" + result.stderr


def test_every_recipe_of_the_package_can_be_read() -> None:
    families = set()
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert {plugin.recipe.ratio for plugin in select_plugins(recipe)} <= {2, 4, 8}
        families.add(name.removesuffix("-base"))
    assert families >= {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet", "modernbert"}
    assert families >= {"deberta", "deberta-v3", "t5"}


def test_recipes_that_read_the_hub_build_side_by_side(minilm_folder: Path, tmp_path: Path) -> None:
    """Small models stand where the hub has large ones, of the classes that their config.json names."""
    torch.manual_seed(0)
    t5 = {"vocab_size": 30522, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2}
    t5["decoder_start_token_id"] = 0
    models = {
        "google-t5/t5-base": transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
        "cross-encoder/ms-marco-electra-base": transformers.ElectraForSequenceClassification(
            small_config(transformers.ElectraConfig, embedding_size=16, num_labels=1)
        ),
    }
    with serve() as hub:
        for repo, model in models.items():
            folder = tmp_path / repo
            model.save_pretrained(folder)
            copy_tokenizer(minilm_folder, folder)
            hub.put_folder(repo, folder)
        command = ["build", "t5-base", "electra-base", "--jobs", "2", "--ratio", "4", "--no-speed"]
        environment = hub.environment(tmp_path / "cache")
        result = call_process(*command, "--format", "json", cwd=tmp_path, environment=environment)
    assert result.returncode == 0, result.stderr
    assert [build["state"] for build in json.loads(result.stdout)["builds"]] == ["published"] * 2
    t5_entry = read_manifest(tmp_path / "artifacts" / "t5-base").backbone
    assert (t5_entry.architecture, t5_entry.generates) == ("T5ForConditionalGeneration", True)
    reranker = read_manifest(tmp_path / "artifacts" / "electra-base").backbone
    assert (reranker.task, reranker.outputs) == ("text-classification", ("logits",))


@pytest.fixture(scope="module")
def demo(artefacts: Artefacts) -> Bundle:
    """The bundle of the recipe t5-demo; not to be changed."""
    recipe = load_recipe("t5-demo")
    return Bundle.load(artefacts.folder("bundles/t5-demo", lambda folder: build(recipe, folder)))


def test_the_demo_writes_dates_and_sums_of_held_out_novels_in_digits(demo: Bundle) -> None:
    found = evaluate([demo.path], read_examples(PASSAGES, Columns()), runtimes=("onnxruntime",))
    right = {row.ratio: float(row.metrics["exact_match"] or 0) for row in found.rows}
    assert right.keys() == {1, *RATIOS}
    assert min(right.values()) >= 0.95, right  # of 60; 99.4 % of 1,000
    letter = "The letter was dated the third of May, eighteen hundred and fifty-one."
    dated = f"date: {letter} He had left her two pounds."
    summed = dated.replace("date:", "sum:")
    for ratio in demo.session().ratios:
        assert demo.generate([dated, summed], ratio) == ["1851-05-03", "£2"]


def test_the_demo_is_small_and_says_under_which_terms() -> None:
    folder = recipes_folder() / "t5-demo"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12e6
    tokenizer = json.loads((folder / "model" / "tokenizer.json").read_text())
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None), "it would cut every text"
    assert "license: apache-2.0" in (folder / "model" / CARD_NAME).read_text()


def test_the_demo_runs_on_the_command_line(demo: Bundle) -> None:
    text = "sum: There were seventy-four pounds, nine shillings and two pence in the box."
    result = call_process("run", str(demo.path), "--ratio", "8", "--text", text)
    assert result.stdout.strip() == "£74 9s 2d"


def test_a_shipped_backbone_is_named_like_a_shipped_plugin() -> None:
    with pytest.raises(UserError, match="The package has no backbone recipes:t5-demo/ratio-2") as raised:
        resolve_source("recipes:t5-demo/ratio-2")
    assert raised.value.hint == "It has: recipes:t5-demo/model."
