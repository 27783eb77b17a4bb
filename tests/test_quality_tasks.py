"""Quality of models with a head: tags, answers, masked tokens, scores, and any number of classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from variator_export.building.evaluate import evaluate
from variator_export.cli.app import make_app
from variator_export.core.errors import UsageError, UserError
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.quality.evaluation import Quality
from variator_export.quality.metrics import (
    answer_metrics,
    entity_metrics,
    entity_spans,
    masked_token_metrics,
    multi_label_metrics,
    rouge_l,
    text_metrics,
)
from variator_export.sessions import Bundle

BundleOf = Callable[[str], Bundle]
GRAPHS = ("onnxruntime",)


def _measured(bundle: Bundle, source: Path, columns: Columns, task: str | None = None) -> Quality:
    """Evaluate a bundle, eager and exported, which must agree."""
    return evaluate(bundle.path, read_examples(str(source), columns), task=task)


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_entities_count_with_their_words_and_type() -> None:
    assert entity_spans(["O", "B-A", "I-A", "B-A", "I-B", "O"]) == {("A", 1, 3), ("A", 3, 4), ("B", 4, 5)}
    assert entity_spans(["I-A", "E-A", "I-A", "S-B"]) == {("A", 0, 2), ("A", 2, 3), ("B", 3, 4)}
    assert entity_spans([]) == set()
    true = [["B-A", "I-A", "O", "B-B"], ["O", "B-A"]]
    found = [["B-A", "O", "O", "B-B"], ["O", "B-A"]]
    metrics = {name: samples.value for name, samples in entity_metrics(found, true, true).items()}
    assert metrics == pytest.approx(
        {"f1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3, "accuracy": 5 / 6, "agreement": 5 / 6}
    )


def test_answers_are_compared_as_squad_does() -> None:
    metrics = answer_metrics(
        ["The Eiffel tower!", "in May 1901", "no"],
        ["x", "in May 1901", "no"],
        [["eiffel  Tower"], ["May"], ["yes"]],
    )
    assert metrics["exact_match"].value == pytest.approx(1 / 3)
    assert metrics["f1"].value == pytest.approx((1 + 2 * (1 / 3) / (1 / 3 + 1) + 0) / 3)
    assert metrics["agreement"].value == pytest.approx(2 / 3)


def test_multi_label_metrics_by_hand() -> None:
    true = np.array([[1, 0, 0], [1, 1, 0]], bool)
    found = np.array([[1, 0, 1], [1, 1, 0]], bool)
    metrics = {name: samples.value for name, samples in multi_label_metrics(found, true, true).items()}
    assert metrics == pytest.approx({"f1": 6 / 7, "f1_macro": 2 / 3, "accuracy": 0.5, "agreement": 5 / 6})


def test_perplexity_by_hand() -> None:
    tokens = [np.array([[5, 5, np.log(0.5)]]), np.array([[7, 5, np.log(0.25)], [8, 8, np.log(0.5)]])]
    metrics = masked_token_metrics(tokens, tokens)
    assert metrics["perplexity"].value == pytest.approx((1 / (0.5 * 0.25 * 0.5)) ** (1 / 3))
    assert metrics["accuracy"].value == pytest.approx(2 / 3)


def test_rouge_l_by_hand() -> None:
    # The longest common subsequence is "the cat on mat": 4 of 6 and of 5 words.
    assert rouge_l("The cat sat on a mat", "the cat is on mat!") == pytest.approx(2 * 4 / (6 + 5))
    assert rouge_l("b a", "a b") == pytest.approx(0.5), "the order counts"
    assert rouge_l("Größe 5", "größe: 5") == 1.0, "letters of every language, punctuation aside"
    assert (rouge_l("", "word"), rouge_l("word", ""), rouge_l("", "...")) == (0.0, 0.0, 1.0)
    metrics = text_metrics(["a b", "c d", "e"], ["a b", "x", "e"], [("x", "a b "), ("c",), ("y", "f e")])
    values = {name: samples.value for name, samples in metrics.items()}
    assert values == pytest.approx(
        {"rouge_l": (1 + 2 / 3 + 2 / 3) / 3, "exact_match": 1 / 3, "agreement": 2 / 3}
    )


def test_tags_are_those_of_transformers(
    bundle_of: BundleOf, small_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uncompressed model's own tags, from words as transformers encodes them: F1 is 1."""
    folder, names = small_model("roberta"), ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    sentences = [
        ["Ms", "Smith-Jones", "left", "Loughborough", "."],
        ["The", "ferry", "leaves", "at", "seven", "."],
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.RobertaForTokenClassification.from_pretrained(folder)
    rows = []
    for words in sentences:
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            best = model(**encoded).logits[0].argmax(-1).tolist()
        ids = encoded.word_ids(0)
        rows.append({"words": words, "tags": [names[best[ids.index(word)]] for word in range(len(words))]})
    config = Bundle.config

    def with_names(bundle: Bundle) -> dict[str, Any]:
        return {**config(bundle), "id2label": {str(i): name for i, name in enumerate(names)}}

    monkeypatch.setattr(Bundle, "config", with_names)
    data = _jsonl(tmp_path / "tags.jsonl", rows)
    quality = _measured(bundle_of("roberta"), data, Columns("words", None, "tags"))
    assert (quality.task, quality.metric) == ("token-classification", "f1")
    assert quality.rows[0].metrics["accuracy"] == 1.0
    assert quality.rows[0].metrics["f1"] == 1.0
    assert quality.rows[1].metrics["agreement"] == quality.rows[1].metrics["accuracy"]
    conll = tmp_path / "tags.conll"
    conll.write_text(
        "\n\n".join(
            "\n".join(f"{word} X {tag}" for word, tag in zip(row["words"], row["tags"], strict=True))
            for row in rows
        )
    )
    assert _measured(bundle_of("roberta"), conll, Columns()).rows == quality.rows
    rows[1]["tags"].pop()
    with pytest.raises(UserError, match="line 2 has 6 words and 5 tags"):
        _measured(bundle_of("roberta"), _jsonl(data, rows), Columns("words", None, "tags"))


def test_words_that_were_cut_off_count_as_outside(bundle_of: BundleOf, tmp_path: Path) -> None:
    words = ["ferry"] * 100
    data = _jsonl(tmp_path / "long.jsonl", [{"text": words, "label": ["LABEL_1"] * 100}])
    quality = evaluate(
        bundle_of("roberta").path, read_examples(str(data), Columns()), max_tokens=12, runtimes=GRAPHS
    )
    assert quality.metric == "accuracy"  # tags without positions
    assert quality.data["truncated"] == 1
    assert float(quality.rows[0].metrics["accuracy"] or 0) <= 0.1


def test_answers_are_those_of_predict(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of("xlm-roberta")
    pairs = [
        ("When does it leave?", "The ferry leaves at seven, and the boat at nine."),
        ("Who left?", "Ms Smith left early; Mr Jones stayed."),
    ]
    answers = [found["answer"] for found in bundle.predict(pairs)]
    rows = [
        {"question": q, "context": c, "answers": {"text": ["something else", answer], "answer_start": [0, 0]}}
        for (q, c), answer in zip(pairs, answers, strict=True)
    ]
    columns = Columns("question", "context", "answers")
    quality = _measured(bundle, _jsonl(tmp_path / "squad.jsonl", rows), columns)
    assert (quality.task, quality.metric) == ("question-answering", "f1")
    assert quality.rows[0].metrics == {"f1": 1.0, "exact_match": 1.0, "agreement": 1.0}
    rows[0]["answers"] = {"text": [], "answer_start": []}
    with pytest.raises(UserError, match="line 1 has no answer"):
        _measured(bundle, _jsonl(tmp_path / "squad.jsonl", rows), columns)
    with pytest.raises(UserError, match="needs questions and contexts"):
        _measured(bundle, tmp_path / "squad.jsonl", Columns("question", None, "answers"))


def test_perplexity_is_that_of_transformers_loss(
    bundle_of: BundleOf, small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle, model = (
        bundle_of("electra"),
        transformers.ElectraForMaskedLM.from_pretrained(small_model("electra")),
    )
    texts = ["The ferry leaves at seven, and the boat at nine.", "It rains."]
    data = _jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    quality = _measured(bundle, data, Columns("text", None, None))
    assert (quality.task, quality.metric) == ("fill-mask", "accuracy")
    # The same masks, found from the rows that were run.
    from variator_export.quality.tasks.base import Encode, EvaluatedModel
    from variator_export.quality.tasks.masked_tokens import FILL_MASK

    encoder = bundle.text_encoder()
    asked = EvaluatedModel("", "fill-mask", ("logits",), ("logits",), bundle.config())
    examples = read_examples(str(data), Columns("text", None, None))
    rows = FILL_MASK.measurement(asked, examples, Encode(encoder, None, None, "fill-mask")).rows
    total, count = 0.0, 0
    for text, row in zip(texts, rows, strict=True):
        true = torch.tensor([encoder.encodings([text])[0].ids])
        masked = torch.tensor([list(row.ids)])
        changed = masked != true
        assert changed.sum() == max(1, round(0.15 * (true.shape[1] - 2)))
        with torch.inference_mode():
            loss = model(input_ids=masked, labels=torch.where(changed, true, -100)).loss
        total, count = total + float(loss) * int(changed.sum()), count + int(changed.sum())
    assert quality.rows[0].metrics["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)


@pytest.fixture
def as_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Change what a bundle's config.json says."""
    config = Bundle.config

    def change(changes: dict[str, Any]) -> None:
        monkeypatch.setattr(Bundle, "config", lambda bundle: {**config(bundle), **changes})

    return change


def test_any_number_of_classes(
    bundle_of: BundleOf, as_model: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    names = ["joy", "anger", "fear"]
    as_model(
        {
            "problem_type": "multi_label_classification",
            "id2label": {str(i): name for i, name in enumerate(names)},
        }
    )
    bundle, texts = bundle_of("bert-classifier"), ["Fine.", "Not so fine at all.", "Hm."]
    said = [
        [name for name, score in found["scores"].items() if score > 0.5] for found in bundle.predict(texts)
    ]
    data = _jsonl(tmp_path / "dev.jsonl", [{"text": t, "label": s} for t, s in zip(texts, said, strict=True)])
    quality = _measured(bundle, data, Columns())
    assert (quality.task, quality.metric) == ("multi-label", "f1")
    assert quality.rows[0].metrics["accuracy"] == 1.0
    table = tmp_path / "dev.tsv"
    table.write_text("text\tlabel\nFine.\tjoy, fear\n")
    assert _measured(bundle, table, Columns()).task == "multi-label"
    table.write_text("text\tlabel\nFine.\tjoy,envy\n")
    with pytest.raises(UserError, match="line 2: the label 'envy' is not one of the classifier's"):
        _measured(bundle, table, Columns())
    with pytest.raises(UserError, match=r"classification does not fit .*describes multi-label"):
        _measured(bundle, table, Columns(), task="classification")


def test_scores_of_a_regression(
    bundle_of: BundleOf, as_model: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    as_model({"problem_type": "regression"})
    bundle, texts = bundle_of("bert-classifier"), ["Fine.", "Not so fine at all.", "Hm.", "The ferry."]
    logits = bundle.text_model().outputs(bundle.text_encoder().token_rows(texts))
    scores = [float(row["logits"][0]) for row in logits]
    data = _jsonl(
        tmp_path / "dev.jsonl", [{"text": t, "label": s} for t, s in zip(texts, scores, strict=True)]
    )
    quality = _measured(bundle, data, Columns())
    assert (quality.task, quality.metric) == ("regression", "spearman")
    assert quality.rows[0].metrics == pytest.approx({"spearman": 1.0, "pearson": 1.0})


def test_labels_without_names_are_class_indices_and_others_are_mapped(
    bundle_of: BundleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, data = bundle_of("bert-classifier"), tmp_path / "dev.tsv"
    data.write_text("text\tlabel\nfine\t0\nnot so\t2\nhm\t1\n")
    numbers = _measured(bundle, data, Columns())
    data.write_text("text\tlabel\nfine\tgood\nnot so\tbad\nhm\tmeh\n")
    examples = read_examples(str(data), Columns())
    named = examples.relabelled({"good": "LABEL_0", "bad": "LABEL_2", "meh": "LABEL_1"})
    assert evaluate(bundle.path, named).rows == numbers.rows
    with pytest.raises(UserError, match="has no label 'god'; its labels are 'bad', 'good', 'meh'"):
        examples.relabelled({"god": "LABEL_0"})
    command = [
        "evaluate",
        str(bundle.path),
        "--data",
        str(data),
        "--label-column",
        "label",
        "--format",
        "json",
    ]
    command += ["--runtime", "onnxruntime", "--label-map", "good=LABEL_0", "--label-map", "bad=LABEL_2"]
    make_app()([*command, "--label-map", "meh=LABEL_1"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["metrics"] == numbers.rows[2].metrics
    with pytest.raises(UserError, match="the label 'meh'") as error:
        make_app()(command, standalone_mode=False)
    assert error.value.hint.endswith("--label-map meh=LABEL_0")
    for wrong in ("good", "=x", "x="):
        with pytest.raises(UsageError, match="--label-map"):
            make_app()([*command, "--label-map", wrong], standalone_mode=False)


def test_one_class_for_every_text_is_a_warning(
    bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from variator_export.quality.tasks import classification

    keep = classification._OneClass.keep
    monkeypatch.setattr(
        classification._OneClass, "keep", lambda *a: keep(*a) + np.array([0, 99, 0], np.float32)
    )
    data = tmp_path / "dev.tsv"
    data.write_text("text\tlabel\nfine\t0\nnot so\t2\nhm\t1\n")
    quality = evaluate(
        bundle_of("bert-classifier").path, read_examples(str(data), Columns()), runtimes=GRAPHS
    )
    assert quality.warnings == tuple(
        f"ratio-{k} says LABEL_1 for every text, although the examples have 3 classes." for k in (1, 4)
    )
    data.write_text("text\tlabel\nfine\t1\nhm\t1\n")
    same = evaluate(bundle_of("bert-classifier").path, read_examples(str(data), Columns()), runtimes=GRAPHS)
    assert same.warnings == ()
