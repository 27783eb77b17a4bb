"""A recipe that names data: every ratio is evaluated before the bundle is published."""

import dataclasses
import json
from pathlib import Path

import pytest
from command_line import call

from variator_export.building.recipe_build import build
from variator_export.bundle.quality_report import quality_of_graphs
from variator_export.core.errors import NumbersDisagreeError, UserError
from variator_export.core.hashing import sha256_file
from variator_export.core.progress import Progress
from variator_export.model.plugin_file import load_plugin, save_plugin
from variator_export.recipe.recipe import PluginRecipe, QualityRecipe, Recipe
from variator_export.recipe.recipe_file import load_recipe
from variator_export.sessions import Bundle

PAIRS = Path(__file__).parent / "data" / "sentence_pairs.tsv"


@pytest.fixture
def recipe(embedding_model: Path, embedding_plugins: dict[int, Path]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "gated",
            "backbone": {"source": str(embedding_model)},
            "plugins": [{"source": str(embedding_plugins[2])}],
            "quality": {
                "data": str(PAIRS),
                "text_column": "first",
                "pair_column": "second",
                "label_column": "score",
                "task": "embedding",
                "max_loss": 1.0,
            },
            "speed": None,
        }
    )


def with_limit(recipe: Recipe, **change: object) -> Recipe:
    assert recipe.quality is not None
    return recipe.model_copy(update={"quality": recipe.quality.model_copy(update=change)})


def test_a_build_evaluates_stores_and_reuses(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "note", notes.append)
    bundle = tmp_path / "bundle"
    build(recipe, bundle, progress=progress)
    (quality,) = json.loads((bundle / "reports" / "quality.json").read_text()).values()
    rows = {row["variant"]: row for row in quality["rows"]}
    assert rows.keys() == {"ratio-1", "ratio-2"}
    lost = rows["ratio-2"]["relative_loss"]
    assert any(
        note.startswith("cosine on sentence_pairs.tsv: ratio-1") and f"(lost {lost:.2%})" in note
        for note in notes
    )
    assert "manifest.json" in {path.name for path in bundle.iterdir()}
    again = build(recipe, bundle)
    assert not again.published
    assert {step.action for step in again.steps} == {"reused"}
    # A limit that the stored result would not meet: evaluated again, refused, and the old bundle stays.
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(
        NumbersDisagreeError, match=r"ratio-2 loses .*% of cosine on sentence_pairs\.tsv"
    ) as e:
        build(with_limit(recipe, max_loss=lost / 2), bundle)
    assert "--ratio" in str(e.value.hint)
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_retrained_plugin_is_evaluated_again(
    recipe: Recipe, embedding_plugins: dict[int, Path], tmp_path: Path
) -> None:
    """Its graph is the same bytes: the tensors lie in another file."""
    bundle, plugin = tmp_path / "bundle", tmp_path / "plugin"
    build(recipe, bundle)

    def stored() -> dict[str, float]:
        (report,) = json.loads((bundle / "reports" / "quality.json").read_text()).values()
        return {row["variant"]: row["relative_loss"] for row in report["rows"]}

    before = stored()
    loaded = load_plugin(embedding_plugins[2])
    changed = {name: 0.5 * array for name, array in loaded.tensors.items()}
    save_plugin(dataclasses.replace(loaded, tensors=changed), plugin)
    other = recipe.model_copy(update={"plugins": (PluginRecipe(source=str(plugin)),)})
    graph = sha256_file(bundle / "ratio-2.onnx")
    known = quality_of_graphs(bundle, Bundle.load(bundle).variant_hashes(), "ratio-1")
    assert known[0]["variants"].keys() == {"ratio-1", "ratio-2"}
    report = (bundle / "reports" / "quality.json").read_bytes()
    build(other, bundle)
    assert sha256_file(bundle / "ratio-2.onnx") == graph
    assert stored()["ratio-2"] != before["ratio-2"]
    (bundle / "reports" / "quality.json").write_bytes(report)
    known = quality_of_graphs(bundle, Bundle.load(bundle).variant_hashes(), "ratio-1")
    assert known[0]["variants"].keys() == {"ratio-1"}, "the other plugin's result"


def test_nothing_is_published_and_the_exit_code_is_3(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(with_limit(recipe, max_loss=0.0).model_dump(mode="json")))
    result = call("build", str(path), "--output", str(tmp_path / "bundle"))
    assert result.returncode == 3, result.stderr
    assert "the recipe allows 0.00%" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_int8_counts_its_loss_against_float32(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.model_copy(update={"precision": "int8"})
    build(recipe, tmp_path / "bundle")
    (quality,) = json.loads((tmp_path / "bundle" / "reports" / "quality.json").read_text()).values()
    assert {row["runtime"] for row in quality["rows"]} == {"eager", "onnxruntime"}
    (plain,) = (r for r in quality["rows"] if (r["variant"], r["runtime"]) == ("ratio-1", "onnxruntime"))
    assert plain["relative_loss"] != 0.0, "against float32"


def test_data_that_cannot_be_measured_end_a_build_before_the_trace(recipe: Recipe, tmp_path: Path) -> None:
    for change, words in (
        ({"data": str(tmp_path / "no.tsv")}, "no.tsv"),
        ({"text_column": "third"}, "third"),
        ({"task": "classification"}, "classification"),
    ):
        with pytest.raises(UserError, match=words):
            build(with_limit(recipe, **change), tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()


def test_the_path_of_the_data_is_relative_to_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("extends: minilm\nname: gated\nquality: {data: sub/dev.tsv, max_loss: 0.1}\n")
    found = load_recipe(path)
    assert found.quality == QualityRecipe(data=str(tmp_path / "sub" / "dev.tsv"), max_loss=0.1)
    path.write_text("extends: minilm\nname: gated\nquality: {data: 'datasets:a/b,test', max_loss: 0.1}\n")
    assert load_recipe(path).quality == QualityRecipe(data="datasets:a/b,test", max_loss=0.1)
