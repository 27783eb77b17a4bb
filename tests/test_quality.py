"""Quality: the metrics, and `evaluate` on real models, eager and exported."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BLOCK, plugin_for

from variator_export.building.evaluate import evaluate
from variator_export.building.recipe_build import build
from variator_export.cli.app import make_app
from variator_export.core.errors import NumbersDisagreeError, UsageError, UserError
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns, Examples
from variator_export.engines.eager import EagerModel
from variator_export.model.backbone import Backbone, load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.plugin_file import save_plugin
from variator_export.model.source import resolve_source
from variator_export.quality.evaluation import store_quality
from variator_export.quality.metrics import (
    Metrics,
    classification_metrics,
    correlation_metrics,
    embedding_metrics,
    relative_loss,
    retrieval_recall,
    similarity_metrics,
)
from variator_export.quality.samples import interval, loss_interval, mean
from variator_export.recipe.recipe import Recipe
from variator_export.text.tokenizer import TextEncoder

PAIRS = Path(__file__).parent / "data" / "sentence_pairs.tsv"
COLUMNS = Columns("first", "second", "score")


@pytest.fixture(scope="module")
def pairs() -> Examples:
    """Sentence pairs written for these tests."""
    return read_examples(PAIRS, COLUMNS)


def _values(metrics: Metrics) -> dict[str, float | None]:
    return {name: samples.value for name, samples in metrics.items()}


def test_classification_metrics_by_hand() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    plain = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    found = _values(classification_metrics(logits, plain, [0, 1, 1, 1]))
    assert found == pytest.approx({"accuracy": 0.75, "f1": 0.8, "agreement": 0.75})
    three = classification_metrics(np.eye(3), np.eye(3), [0, 1, 1])
    assert three["f1"].value == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_similarity_is_a_rank_correlation() -> None:
    first = np.tile([1.0, 0.0], (4, 1))
    second = np.array([[1.0, 0.1], [1.0, 0.5], [1.0, 1.0], [1.0, 9.0]])
    assert similarity_metrics(first, second * 7, [5, 3, 2, 0])["spearman"].value == pytest.approx(1)
    assert similarity_metrics(first, second, [0, 2, 3, 5])["spearman"].value == pytest.approx(-1)


def test_recall_counts_the_neighbours_that_stay() -> None:
    angles = np.linspace(0, np.pi / 2, 40)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert (retrieval_recall(circle, circle) == np.ones(40)).all()
    shuffled = circle[np.random.default_rng(0).permutation(40)]
    found = retrieval_recall(shuffled, circle)
    assert found is not None
    assert found.mean() < 0.5
    assert retrieval_recall(circle[:10], circle[:10]) is None
    metrics = _values(embedding_metrics(-circle * 3, circle))
    assert metrics["cosine"] == pytest.approx(-1)
    assert metrics["recall_at_10"] == 1.0


def test_a_loss_relative_to_nothing_is_none() -> None:
    assert relative_loss({"accuracy": 0.6}, {"accuracy": 0.8}, "accuracy") == pytest.approx(0.25)
    assert relative_loss({"accuracy": 0.6}, {"accuracy": 0.0}, "accuracy") is None


def test_intervals_hold_what_they_promise() -> None:
    """The interval holds the true mean about 95 times in 100, and a loss of nothing is 0."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = interval(mean(rng.random(80) < 0.7)) or (1.0, 0.0)
        held += low <= 0.7 <= high
    assert 180 <= held <= 199
    same = mean(rng.random(50))
    assert loss_interval(same, same) == (0.0, 0.0)
    half = mean(same.values[:, 0] / 2)
    assert loss_interval(half, same) == (pytest.approx(0.5), pytest.approx(0.5))
    ones = correlation_metrics(np.ones(4), [1.0, 2.0, 3.0, 4.0])["spearman"]
    assert interval(ones) is None


def test_resampled_correlations_are_those_of_scipy() -> None:
    from scipy.stats import pearsonr, spearmanr

    rng = np.random.default_rng(0)
    rows = rng.integers(0, 6, (5, 40, 2)).astype(float)
    found = correlation_metrics(rows[0, :, 0], rows[0, :, 1].tolist())
    for name, of_scipy in (("spearman", spearmanr), ("pearson", pearsonr)):
        expected = [of_scipy(r[:, 0], r[:, 1]).statistic for r in rows]
        assert found[name].reduce(rows) == pytest.approx(expected)


def test_every_ratio_is_measured_eager_and_exported_and_they_agree(
    embedding_bundle: Path, embedding_model: Path, pairs: Examples
) -> None:
    quality = evaluate([embedding_bundle], pairs)
    assert quality.task == "similarity"
    assert [(row.variant, row.runtime) for row in quality.rows] == [
        (f"ratio-{k}", runtime) for runtime in ("eager", "onnxruntime") for k in (1, 2, 4)
    ]
    eager, exported = quality.rows[:3], quality.rows[3:]
    for first, second in zip(eager, exported, strict=True):
        assert first.metrics == pytest.approx(second.metrics, abs=1e-6)
    assert quality.rows[0].metrics["cosine"] == pytest.approx(1)
    assert quality.rows[0].relative_loss == 0
    assert set(quality.agreement) == {"ratio-1", "ratio-2", "ratio-4"}
    # Against the definition, each text on its own.
    info = read_backbone_info(resolve_source(str(embedding_model)))
    encoder = TextEncoder(embedding_model)
    model = EagerModel(load_backbone(info, encoder.pad_token_id), None)
    assert pairs.pairs is not None
    embeddings = [
        model.run(encoder.encode([text], info.spec.family.inputs, None))["sentence_embedding"][0]
        for text in (*pairs.texts, *pairs.pairs)
    ]
    expected = similarity_metrics(np.array(embeddings[:30]), np.array(embeddings[30:]), pairs.scores())
    assert quality.rows[0].metrics["spearman"] == pytest.approx(expected["spearman"].value, abs=1e-6)


def test_results_are_kept_in_the_bundle_as_long_as_they_are_of_its_graphs(
    embedding_bundle: Path, pairs: Examples, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(embedding_bundle, bundle)
    report = bundle / "reports" / "quality.json"
    quality = evaluate([bundle], pairs, runtimes=("onnxruntime",))
    other = evaluate([bundle], pairs, task="embedding", runtimes=("onnxruntime",))
    store_quality(bundle, quality)
    store_quality(bundle, other)
    store_quality(bundle, quality)
    assert sorted(entry["task"] for entry in json.loads(report.read_text()).values()) == [
        "embedding",
        "similarity",
    ]
    store_quality(bundle, dataclasses.replace(quality, graphs={"ratio-1": "another"}))
    assert len(json.loads(report.read_text())) == 1
    report.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON") as error:
        store_quality(bundle, quality)
    assert error.value.hint == f"Remove the broken report: rm '{report}'"


def test_equal_texts_have_no_rank_correlation() -> None:
    ones = np.ones((3, 2))
    assert _values(similarity_metrics(ones, ones, [1, 2, 3])) == {"spearman": None, "pearson": None}
    assert relative_loss({"spearman": None}, {"spearman": 0.8}, "spearman") is None


def test_plugin_folders_are_exported_and_measured_the_same(
    embedding_bundle: Path, embedding_model: Path, embedding_plugins: dict[int, Path], pairs: Examples
) -> None:
    quality = evaluate(list(embedding_plugins.values()), pairs, backbone=str(embedding_model))
    assert quality.rows == evaluate([embedding_bundle], pairs).rows
    with pytest.raises(UserError, match="but not where it is") as error:
        evaluate([embedding_plugins[2]], pairs)
    assert error.value.hint == "Pass its location: --backbone SRC"
    with pytest.raises(UserError, match="neither a bundle nor a folder of a plugin"):
        evaluate([PAIRS.parent], pairs)
    with pytest.raises(UserError, match="only one bundle can be evaluated at a time"):
        evaluate([embedding_plugins[2], embedding_bundle], pairs)
    with pytest.raises(UserError, match="--backbone would not be used"):
        evaluate([embedding_bundle], pairs, backbone="x", runtimes=("onnxruntime",))


def test_an_exported_bundle_is_kept_for_the_build(
    embedding_model: Path, embedding_plugins: dict[int, Path], tmp_path: Path
) -> None:
    kept, backbone = tmp_path / "kept", str(embedding_model)
    command = ["evaluate", str(embedding_plugins[2]), "--backbone", backbone, "--output", str(kept)]
    command += ["--data", str(PAIRS), "--text-column", "first", "--runtime", "onnxruntime"]
    make_app()(command, standalone_mode=False)
    (stored,) = json.loads((kept / "reports" / "quality.json").read_text()).values()
    assert stored["task"] == "embedding"
    recipe = Recipe.model_validate(
        {
            "name": "kept",
            "backbone": {"source": backbone},
            "plugins": [{"source": str(path)} for path in embedding_plugins.values()],
            "speed": None,
        }
    )
    steps = {step.name: step.action for step in build(recipe, kept).steps}
    assert (steps["trace"], steps["bind/ratio-4"]) == ("reused", "made")
    with pytest.raises(UserError, match="is a bundle already"):
        evaluate(kept, read_examples(str(PAIRS), COLUMNS), output=tmp_path / "other")


def test_what_cannot_be_measured_is_refused_before_the_export(
    load_model: Callable[[str], Backbone], pairs: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_model("roberta")
    save_plugin(plugin_for(backbone, 2), tmp_path / "plugin")
    monkeypatch.setattr("variator_export.building.evaluate.build", None)  # would fail if it were called
    source = str(backbone.info.source.folder)
    with pytest.raises(UserError, match="line 2 has 8 words and 1 tags"):
        evaluate([tmp_path / "plugin"], pairs, backbone=source)
    with pytest.raises(UserError, match="The task similarity needs the output sentence_embedding"):
        evaluate([tmp_path / "plugin"], pairs, backbone=source, task="similarity")


def test_two_plugins_of_one_ratio_are_told_apart(
    tmp_path: Path, embedding_model: Path, embedding_plugins: dict[int, Path], pairs: Examples
) -> None:
    shutil.copytree(embedding_plugins[2], tmp_path / "other")
    quality = evaluate(
        [embedding_plugins[2], tmp_path / "other"],
        pairs,
        backbone=str(embedding_model),
        runtimes=("onnxruntime",),
    )
    assert [row.variant for row in quality.rows] == ["ratio-1", "1-ratio-2", "2-other"]


def test_a_graph_that_computes_something_else_fails(
    embedding_bundle: Path, pairs: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = EagerModel.run

    def slightly_off(self: EagerModel, inputs: Any) -> Any:
        return {name: values * 1.001 for name, values in run(self, inputs).items()}

    monkeypatch.setattr(EagerModel, "run", slightly_off)
    with pytest.raises(NumbersDisagreeError, match="the graph's outputs differ from eager PyTorch's"):
        evaluate([embedding_bundle], pairs)


def test_a_bundle_of_another_backbone_is_not_compared_with_this_one(
    embedding_bundle: Path, pairs: Examples, load_model: Callable[[str], Backbone]
) -> None:
    other = str(load_model("minilm").info.source.folder)
    with pytest.raises(UserError, match="are not those that the bundle was built from"):
        evaluate([embedding_bundle], pairs, backbone=other)


def test_the_graphs_alone_need_no_torch(embedding_bundle: Path) -> None:
    code = BLOCK + "from variator_export.cli.main import main; main()"
    arguments = ["evaluate", str(embedding_bundle), "--data", str(PAIRS), "--runtime", "onnxruntime"]
    arguments += ["--text-column", "first", "--pair-column", "second", "--label-column", "score"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--format", "json"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert [row["ratio"] for row in document["rows"]] == [1, 2, 4]
    assert document["agreement"] == {}


def test_the_task_follows_model_and_data(embedding_bundle: Path, small_bundle: Path, pairs: Examples) -> None:
    texts = read_examples(str(PAIRS), Columns("first", None, None))
    quality = evaluate([embedding_bundle], texts, runtimes=("onnxruntime",))
    assert quality.task == "embedding"
    # 15 different texts, each twice.
    assert quality.rows[1].metrics["recall_at_10"] != 1.0
    plain = evaluate([small_bundle], texts, runtimes=("onnxruntime",))
    assert (plain.task, plain.metric) == ("hidden-states", "cosine")
    with pytest.raises(UserError, match="needs the output sentence_embedding"):
        evaluate([small_bundle], texts, task="embedding", runtimes=("onnxruntime",))
    with pytest.raises(UserError, match="needs the output logits"):
        evaluate([embedding_bundle], pairs, task="classification", runtimes=("onnxruntime",))
    with pytest.raises(UserError, match="needs labels or scores"):
        evaluate([embedding_bundle], texts, task="similarity", runtimes=("onnxruntime",))
    scored = read_examples(str(PAIRS), Columns("first", None, "score"))
    with pytest.raises(UserError, match="needs pairs of texts"):
        evaluate([embedding_bundle], scored, task="similarity", runtimes=("onnxruntime",))


def test_a_classifier_is_measured_by_its_own_labels(
    tmp_path: Path, small_model: Callable[[str], Path]
) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "classifier",
            "backbone": {"source": str(small_model("bert-classifier"))},
            "plugins": [{"ratio": 2, "initialise": {}}],
            "speed": None,
        }
    )
    bundle = build(recipe, tmp_path / "bundle").bundle
    data = tmp_path / "dev.tsv"
    data.write_text("text\tlabel\nfine\tLABEL_0\nnot so\tLABEL_2\nhm\tLABEL_1\n")
    quality = evaluate([bundle], read_examples(str(data), Columns()))
    assert quality.task == "classification"
    assert quality.rows[0].metrics["agreement"] == 1.0
    assert 0 <= float(quality.rows[0].metrics["accuracy"] or 0) <= 1
    data.write_text("text\tlabel\nfine\tLABEL_0\nnot so\tgood\n")
    with pytest.raises(UserError, match="line 3: the label 'good' is not one of the classifier's: LABEL_0"):
        evaluate([bundle], read_examples(str(data), Columns()))


def test_the_result_is_written_into_model_cards(
    tmp_path: Path, embedding_model: Path, embedding_bundle: Path, embedding_plugins: dict[int, Path]
) -> None:
    folder = tmp_path / "plugin"
    shutil.copytree(embedding_plugins[2], folder)
    card = folder / "README.md"
    arguments = ["evaluate", str(folder), "--backbone", str(embedding_model), "--data", str(PAIRS)]
    arguments += ["--text-column", "first", "--pair-column", "second", "--label-column", "score", "--card"]
    with pytest.raises(UserError, match=r"has no README\.md"):
        make_app()(arguments, standalone_mode=False)
    card.write_text("# Mine\n<!-- quality: begin -->\nold\n<!-- quality: end -->\nrest\n")
    make_app()(arguments, standalone_mode=False)
    text = card.read_text()
    assert "old" not in text
    assert "| ratio-2 |" in text
    assert text.startswith("# Mine")
    assert text.endswith("rest\n")
    card.write_text("# Mine\n")
    with pytest.raises(UserError, match="no place for the quality"):
        make_app()(arguments, standalone_mode=False)
    with pytest.raises(UsageError, match="a bundle has no model cards"):
        make_app()(
            ["evaluate", str(embedding_bundle), "--data", str(PAIRS), "--text-column", "first", "--card"],
            standalone_mode=False,
        )
