"""From text to result: limits, prompts, threads, embeddings and predictions, as a model's users get them."""

import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from artefacts import Artefacts
from command_line import call
from sentence_transformers import SentenceTransformer

from variator_export import Bundle, NumbersDisagreeError, UserError, build
from variator_export.recipe.recipe import Recipe
from variator_export.text.settings import TextSettings, read_text_settings
from variator_export.text.tokenizer import TextEncoder
from variator_export.verification import text_check

LIMIT = 40
PROMPTS = {"query": "represent the query: ", "passage": "passage: "}
WORDS = [
    "The",
    "ferry",
    "leaves",
    "Älesund",
    "at",
    "seven,",
    "and",
    "Bergen's",
    "boat",
    "follows.",
    "Prices",
    "rose;",
    "nobody",
    "knew",
    "why",
]


def _recipe(folder: Path, **changes: object) -> Recipe:
    recipe = {
        "name": "small",
        "backbone": {"source": str(folder)},
        "plugins": [{"ratio": 4, "initialise": {}}],
        "targets": ["onnxruntime"],
        "speed": None,
    }
    return Recipe.model_validate(recipe | changes)


@pytest.fixture(scope="module")
def prompted_model(artefacts: Artefacts, embedding_model: Path) -> Path:
    """The small embedding model with a limit of its own, prompts, and texts that are lower-cased."""

    def make(folder: Path) -> None:
        shutil.copytree(embedding_model, folder, dirs_exist_ok=True)
        _write(folder / "sentence_bert_config.json", {"max_seq_length": LIMIT, "do_lower_case": True})
        _write(
            folder / "config_sentence_transformers.json",
            {"prompts": PROMPTS, "default_prompt_name": "passage"},
        )

    return artefacts.folder("models/prompted", make)


@pytest.fixture(scope="module")
def prompted_bundle(artefacts: Artefacts, prompted_model: Path) -> Path:
    return artefacts.folder("bundles/prompted", lambda folder: build(_recipe(prompted_model), folder))


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def _texts(count: int, longest: int) -> list[str]:
    """Texts of 1 to `longest` words, in random order."""
    rng = random.Random(0)
    lengths = [1 + index * (longest - 1) // (count - 1) for index in range(count)]
    rng.shuffle(lengths)
    return [" ".join(rng.choices(WORDS, k=length)) for length in lengths]


def _with(folder: Path, source: Path, **files: object) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copyfile(source / name, folder / name)
    for name, content in files.items():
        _write(folder / f"{name}.json", content)
    return folder


def test_a_thousand_embeddings_are_those_of_sentence_transformers(
    prompted_model: Path, prompted_bundle: Path
) -> None:
    texts = _texts(1000, 600)
    theirs, bundle = SentenceTransformer(str(prompted_model), device="cpu"), Bundle.load(prompted_bundle)
    some, plain = texts[:50], theirs.encode(texts[:50], prompt="")
    for chosen, options in (
        (texts, {}),
        (texts, {"prompt_name": "query"}),
        (some, {"prompt": ""}),
        (some, {"prompt": "about boats: "}),
    ):
        found = bundle.embed(chosen, batch_size=64, **options)  # type: ignore[arg-type]
        assert found.dtype == np.float32
        expected = theirs.encode(chosen, **options)  # type: ignore[call-overload]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        if options != {"prompt": ""}:
            assert np.abs(found[:50] - plain).max() > 0.05, "the prompt matters"


def test_minilm_is_truncated_where_it_says(minilm_folder: Path, minilm_bundle: Path) -> None:
    texts = [" ".join(WORDS * count) for count in (1, 12, 25, 40)]
    bundle = Bundle.load(minilm_bundle)
    assert bundle.text_encoder().max_length == 256
    theirs = SentenceTransformer(str(minilm_folder), device="cpu").encode(texts)
    np.testing.assert_allclose(bundle.embed(texts), theirs, atol=1e-6)
    # Only one text in a batch of its length, and in its own place.
    np.testing.assert_allclose(bundle.embed(texts[::-1], batch_size=1)[::-1], theirs, atol=1e-6)


def test_the_limit_is_that_of_the_users_libraries(minilm_folder: Path, tmp_path: Path) -> None:
    for files, limit in (
        ({}, 512),
        ({"sentence_bert_config": {"max_seq_length": 128}}, 128),
        ({"sentence_roberta_config": {"max_seq_length": 64}, "config": {"max_position_embeddings": 32}}, 64),
        ({"sentence_bert_config": {"max_seq_length": 9, "processor_kwargs": {"model_max_length": 7}}}, 7),
        ({"sentence_bert_config": {}, "tokenizer_config": {"model_max_length": 99}}, 99),
        ({"tokenizer_config": {"model_max_length": int(1e30)}, "config": {}}, None),
        ({"tokenizer_config": {}, "config": {"max_position_embeddings": -1}}, None),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        assert read_text_settings(_with(folder, minilm_folder, **files)).max_length == limit, files
    folder = tmp_path / "wrong"
    folder.mkdir()
    for value in (0, -5, "many", True, []):
        _with(folder, minilm_folder, sentence_bert_config={"max_seq_length": value})
        with pytest.raises(UserError, match=r"sentence_bert_config\.json limits texts to"):
            read_text_settings(folder)


def test_prompts_that_are_broken_or_not_there(minilm_folder: Path, tmp_path: Path) -> None:
    for content, words in (
        ({"prompts": ["a"]}, "prompts that are not texts by name"),
        ({"prompts": {"a": 3}}, "prompts that are not texts by name"),
        ({"prompts": {"a": "b"}, "default_prompt_name": "c"}, "the default prompt 'c', which is not among"),
    ):
        with pytest.raises(UserError, match=words):
            read_text_settings(_with(tmp_path, minilm_folder, config_sentence_transformers=content))
    settings = TextSettings(prompts=PROMPTS)
    assert (settings.prompt(), settings.prompt("document")) == ("", "")
    with pytest.raises(
        UserError, match="The model has no prompt 'pasage'; it has query, document, passage"
    ) as e:
        settings.prompt("pasage")
    assert e.value.hint == "Did you mean 'passage'?"


def test_a_pooling_that_leaves_the_prompt_out_is_refused(prompted_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "instructor"
    shutil.copytree(prompted_model, folder)
    _write(
        folder / "1_Pooling" / "config.json",
        {"pooling_mode": "mean", "embedding_dimension": 32, "include_prompt": False},
    )
    with pytest.raises(UserError, match="leaves the prompt's tokens out of the pooling"):
        build(_recipe(folder), tmp_path / "b")


def test_threads_share_an_encoder_and_a_bundle(prompted_bundle: Path) -> None:
    """One thread truncates while another refuses, or truncates elsewhere."""
    bundle = Bundle.load(prompted_bundle)
    encoder, long = bundle.text_encoder(), "word " * 100
    wanted = bundle.embed([long, "short"], 4)
    wrong: list[str] = []

    def work(kind: int) -> None:
        for _ in range(60):
            if kind == 0:
                lengths = [len(row.ids) for row in encoder.token_rows([long], prompt="", max_length=17)]
                wrong.extend(["17"] if lengths != [17] else [])
            elif kind == 1:
                try:
                    encoder.token_rows([long], truncate=False)
                    wrong.append("not refused")
                except UserError:
                    pass
            elif kind == 2:
                if len(encoder.encode_plain([long])[0][0]) != 100:
                    wrong.append("cut silently")
            elif np.abs(bundle.embed([long, "short"], 4) - wanted).max() > 1e-6:
                wrong.append("embedding")

    threads = [threading.Thread(target=work, args=(number % 4,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_holds_texts(prompted_bundle: Path) -> None:
    pandas = pytest.importorskip("pandas")
    bundle, texts = Bundle.load(prompted_bundle), ["One.", "The second one is longer."]
    wanted = bundle.embed(texts)
    for same in (tuple(texts), np.array(texts), pandas.Series(texts, index=[7, 3]), (t for t in texts)):
        np.testing.assert_array_equal(bundle.embed(same), wanted)
    np.testing.assert_allclose(bundle.embed(texts[0]), wanted[0], atol=1e-6)
    assert bundle.embed(texts[0]).shape == (32,)
    for wrong, words in (
        (["a", None], "Text 2 is None, of type NoneType, not a string"),
        (["a", "b", float("nan")], "Text 3 is nan, of type float"),
        ([], "There is no text"),
        (["\udcff"], "Text 1 is not valid Unicode"),
    ):
        with pytest.raises(UserError, match=words):
            bundle.embed(wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no variant 3"):
        bundle.embed(texts, 3)
    with pytest.raises(UserError, match="The batch size is 0"):
        bundle.embed(texts, batch_size=0)
    with pytest.raises(UserError, match="task is feature-extraction, which has no predictions"):
        bundle.predict(texts)


def test_one_long_text_does_not_pad_the_others(
    prompted_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(prompted_bundle)
    session = bundle.session()
    shapes = []

    class Watched:
        def run(
            self, inputs: dict[str, np.ndarray], ratio: object = None, outputs: object = None
        ) -> dict[str, np.ndarray]:
            shapes.append(inputs["input_ids"].shape)
            assert outputs == ["sentence_embedding"], "the outputs of every token are not copied"
            return session.run(inputs, ratio=ratio, outputs=outputs)

    monkeypatch.setattr(bundle, "session", lambda *_, **__: Watched())
    bundle.embed(["two words"] * 47 + ["word " * 90], batch_size=64)
    assert shapes == [(47, 6), (1, LIMIT)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression"},
        {"id2label": {"0": "good", "1": "bad", "2": "meh"}},
    ],
    ids=["softmax", "sigmoid", "none", "names"],
)
def test_labels_are_those_of_transformers_pipeline(
    bundle_of: Callable[[str], Bundle],
    small_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
) -> None:
    bundle = bundle_of("bert-classifier")
    folder = shutil.copytree(small_model("bert-classifier"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    _write(folder / "config.json", config)
    monkeypatch.setattr(bundle, "config", lambda: config)
    pipeline = transformers.pipeline("text-classification", str(folder), device="cpu", top_k=None)
    texts = ["The ferry leaves at seven.", "Boats."]
    for found, expected in zip(bundle.predict(texts), pipeline(texts), strict=True):
        assert found["label"] == expected[0]["label"]
        assert found["scores"] == {row["label"]: pytest.approx(row["score"], abs=1e-5) for row in expected}
    pair = {"text": texts[0], "text_pair": texts[1]}
    (found,) = bundle.predict([(texts[0], texts[1])])
    assert found["score"] == pytest.approx(pipeline([pair])[0][0]["score"], abs=1e-5)
    with pytest.raises(UserError, match="Row 2 is 'a', not a pair of texts as other rows are"):
        bundle.predict([("a", "b"), "a"])


def test_the_activation_of_a_cross_encoder() -> None:
    from variator_export.text.predictions import Labels

    logits = np.array([2.0])
    for config, score in (
        ({}, 1 / (1 + np.exp(-2.0))),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, 2.0),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, 2.0),
    ):
        assert Labels.read(config, 1).scores(logits)[0] == pytest.approx(score)
    with pytest.raises(UserError, match=r"names the activation mine\.Own"):
        Labels.read({"sentence_transformers": {"activation_fn": "mine.Own"}}, 1)
    with pytest.raises(UserError, match=r"labels for the classes \[0\]; the model has 2"):
        Labels.read({"id2label": {"0": "a"}}, 2)


def test_entities_are_those_of_transformers_pipeline(
    bundle_of: Callable[[str], Bundle],
    small_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = bundle_of("roberta")
    folder = shutil.copytree(small_model("roberta"), tmp_path / "model")
    names = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    config = json.loads((folder / "config.json").read_text()) | {
        "id2label": {str(k): v for k, v in names.items()}
    }
    _write(folder / "config.json", config)
    monkeypatch.setattr(bundle, "config", lambda: config)
    pipeline = transformers.pipeline(
        "token-classification", str(folder), device="cpu", aggregation_strategy="simple"
    )
    texts = _texts(20, 30)
    count = 0
    for text, found in zip(texts, bundle.predict(texts), strict=True):
        expected = pipeline(text)
        count += len(expected)
        keys = ("entity_group", "start", "end")
        assert [[e[k] for k in keys] for e in found] == [[e[k] for k in keys] for e in expected]
        assert [e["score"] for e in found] == pytest.approx([float(e["score"]) for e in expected], abs=1e-5)
        assert all(e["word"] == text[e["start"] : e["end"]] for e in found)
    assert count > 20


def test_answers_are_in_the_context(bundle_of: Callable[[str], Bundle]) -> None:
    bundle = bundle_of("xlm-roberta")
    context = "The ferry leaves at seven, and the boat at nine."
    (found,) = bundle.predict([("When does it leave?", context)])
    assert context[found["start"] : found["end"]] == found["answer"]
    # The best of all spans, counted one by one.
    encoder, inputs = bundle.text_encoder(), bundle.manifest.backbone.inputs
    outputs = bundle.session().run(encoder.encode(["When does it leave?"], inputs, pairs=[context]))
    (encoding,) = encoder.encodings(["When does it leave?"], pairs=[context])
    places = [i for i, part in enumerate(encoding.sequence_ids) if part == 1]

    def chances(name: str) -> np.ndarray:
        powers = np.exp(outputs[name][0][places].astype(np.float64))
        return np.asarray(powers / powers.sum())

    start, end = chances("start_logits"), chances("end_logits")
    best = max(
        (start[i] * end[j], encoding.offsets[places[i]][0], encoding.offsets[places[j]][1])
        for i in range(len(places))
        for j in range(i, min(i + 15, len(places)))
    )
    assert (found["score"], found["start"], found["end"]) == pytest.approx(best)
    with pytest.raises(UserError, match="needs pairs of texts"):
        bundle.predict(["When?"])


def test_tokens_are_those_of_transformers_pipeline(
    bundle_of: Callable[[str], Bundle], small_model: Callable[[str], Path]
) -> None:
    texts = ["The [MASK] leaves at seven.", "The [MASK] leaves at [MASK]."]
    pipeline = transformers.pipeline("fill-mask", str(small_model("electra")), device="cpu")
    one, two = bundle_of("electra").predict(texts)
    for found, expected in ((one, [pipeline(texts[0])]), (two, pipeline(texts[1]))):
        for mine, theirs in zip(found, expected, strict=True):
            assert [t["token"] for t in mine] == [t["token"] for t in theirs]
            assert [t["token_str"] for t in mine] == [t["token_str"] for t in theirs]
            assert [t["score"] for t in mine] == pytest.approx([t["score"] for t in theirs], rel=1e-4)


@pytest.mark.parametrize("fault", ["limit", "prompt", "pooling"])
def test_a_build_that_handles_text_otherwise_is_not_published(
    prompted_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    from variator_export.text import tokenizer

    def forgets(folder: Path) -> TextSettings:
        settings = read_text_settings(folder)
        return TextSettings(
            max_length=None if fault == "limit" else settings.max_length,
            lower_case=settings.lower_case,
            prompts=settings.prompts,
            default_prompt_name=None if fault == "prompt" else settings.default_prompt_name,
        )

    monkeypatch.setattr(tokenizer, "read_text_settings", forgets)
    folder = shutil.copytree(prompted_model, tmp_path / "model")
    if fault == "pooling":
        # The graph has mean pooling; the libraries now take the first token.
        made = text_check.check_texts

        def other_pooling(*arguments: object, **options: object) -> object:
            _write(folder / "1_Pooling" / "config.json", {"pooling_mode": "cls", "embedding_dimension": 32})
            return made(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr("variator_export.building.steps.graphs.check_texts", other_pooling)
    with pytest.raises(NumbersDisagreeError, match="is not the one of sentence-transformers"):
        build(_recipe(folder), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_labels_in_another_order_are_not_published(
    small_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from variator_export.text.predictions import Labels

    read = Labels.read
    monkeypatch.setattr(
        Labels,
        "read",
        lambda *a: Labels(read(*a).names[::-1], read(*a).activation),  # type: ignore[arg-type]
    )
    with pytest.raises(NumbersDisagreeError, match="is not the one of transformers"):
        build(_recipe(small_model("bert-classifier")), tmp_path / "b")


def test_run_reads_files_and_writes_results(
    prompted_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["One.", "The second one.", "word " * 90]
    wanted = Bundle.load(prompted_bundle).embed(texts, 4)
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"line": text}) + "\n" for text in texts))
    command = ["run", str(prompted_bundle), "--ratio", "4", "--output-name", "sentence_embedding"]
    for source in (["--input", "texts.txt"], ["--input", "texts.jsonl", "--text-column", "line"]):
        result = call(*command, *source, "--output", "v.npy", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert f"1 of 3 texts were truncated to the model's limit of {LIMIT} tokens" in result.stderr
        np.testing.assert_allclose(np.load(tmp_path / "v.npy"), wanted, atol=1e-6)
    for suffix in ("jsonl", "parquet"):
        assert call(*command, *source, "--output", f"v.{suffix}", cwd=tmp_path).returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    import pyarrow.parquet

    for found in (rows, pyarrow.parquet.read_table(tmp_path / "v.parquet").to_pylist()):
        assert [row["text"] for row in found] == texts
        np.testing.assert_allclose([row["sentence_embedding"] for row in found], wanted, atol=1e-6)
    with (tmp_path / "texts.txt").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        result = call(*command, "--input", "-", "--format", "json", cwd=tmp_path)
    found = [row["outputs"]["sentence_embedding"] for row in json.loads(result.stdout)["results"]]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    with_prompt = call(*command, "--text", "One.", "--prompt", "query", "--format", "json")
    (row,) = json.loads(with_prompt.stdout)["results"]
    expected = Bundle.load(prompted_bundle).embed("One.", 4, prompt_name="query")
    np.testing.assert_allclose(row["outputs"]["sentence_embedding"], expected, atol=1e-6)


def test_lines_end_only_where_a_line_ends(prompted_bundle: Path, tmp_path: Path) -> None:
    """A text may hold other separators, and the byte order mark is no text."""
    (tmp_path / "texts.txt").write_bytes("\ufeffOne\u2028two\u0085three.\r\nFour.\n".encode())
    result = call("run", str(prompted_bundle), "--input", "texts.txt", "--format", "json", cwd=tmp_path)
    assert [row["text"] for row in json.loads(result.stdout)["results"]] == [
        "One\u2028two\u0085three.",
        "Four.",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--input", "gone.txt"], 1, "gone.txt cannot be read"),
        (["--input", "bad.txt"], 1, "bad.txt, line 1 is not UTF-8: byte 0xff at column 1"),
        (["--input", "empty.txt"], 1, "empty.txt is empty"),
        (["--input", "ok.txt", "--text", "a"], 2, "--input and --text were both given"),
        (["--text", "a", "--pair", "b", "--pair", "c"], 2, "1 --text and 2 --pair were given"),
        (["--text", "a", "--output-name", "logits"], 2, "logits"),
        (
            ["--text", "a", "--output", "v.npy", "--output-name", "last_hidden_state"],
            2,
            ".npy takes one output",
        ),
        (["--text", "a", "--output", "v.csv"], 2, "v.csv has the suffix .csv"),
        (["--text", "a", "--output", "nowhere/v.npy"], 1, "cannot be written"),
        (["--text", "a", "--prompt", "qery"], 1, "has no prompt 'qery'"),
        (["--text", "word " * 90, "--no-truncate"], 1, f"the limit is {LIMIT}"),
    ],
)
def test_what_run_refuses(
    prompted_bundle: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "ok.txt").write_text("Yes.\n")
    result = call("run", str(prompted_bundle), *arguments, cwd=tmp_path)
    assert (result.returncode, words in result.stderr) == (code, True), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("bert-classifier", ["--text", "Boats."], "label"),
        ("xlm-roberta", ["--text", "When?", "--pair", "At seven."], "answer"),
        ("electra", ["--text", "The [MASK]."], "mask"),
    ],
)
def test_run_prints_predictions(
    bundle_of: Callable[[str], Bundle], model: str, arguments: list[str], words: str
) -> None:
    result = call("run", str(bundle_of(model).path), *arguments)
    assert result.returncode == 0, result.stderr
    assert f"│ {words} " in result.stdout
    as_json = json.loads(call("run", str(bundle_of(model).path), *arguments, "--format", "json").stdout)
    (row,) = as_json["results"]
    assert {"label": "label", "answer": "answer", "mask": "predictions"}[words] in row


def test_an_encoder_refuses_a_limit_without_room_for_text(minilm_folder: Path) -> None:
    encoder = TextEncoder(minilm_folder)
    assert encoder.token_rows(["a b c"], 3)[0].truncated
    with pytest.raises(
        UserError, match="The limit of 2 tokens leaves no room for text beside 2 special tokens"
    ):
        encoder.token_rows(["a"], 2)
    with pytest.raises(UserError, match="beside 3 special tokens"):
        encoder.token_rows(["a"], 3, pairs=["b"])
