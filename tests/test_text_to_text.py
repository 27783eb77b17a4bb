"""Models that generate text: from checkpoint to generated text, at every ratio."""

import dataclasses
import functools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from artefacts import Artefacts
from command_line import call
from conftest import TEXT_MODELS, VOCAB_SIZE, copy_tokenizer, plugin_for
from safetensors import safe_open
from signed import sign

from variator_export import (
    Bundle,
    Columns,
    NumbersDisagreeError,
    UserError,
    build,
    evaluate,
    read_examples,
)
from variator_export.core.parts import DECODER, ENCODER
from variator_export.engines.eager import EagerModel
from variator_export.graph import trace, trace_decoder
from variator_export.graph.macs import graph_macs, macs_by_node
from variator_export.graph.simplify import module_of
from variator_export.model.backbone import Backbone, load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.macs import analytic_macs
from variator_export.model.methods import method_of
from variator_export.model.plugin_file import save_plugin
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe import Initialise, PluginRecipe, Recipe
from variator_export.recipe.recipe_file import load_recipe, resolve_recipe
from variator_export.verification.generation import decoder
from variator_export.verification.generation.checks import ALONE, FORCED, GREEDY

RATIOS = (2, 3, 4)
TEXTS = [
    "The ferry to the island leaves at seven.",
    "Prices rose 3.4 % in May.",
    "Yes.",
    "She had kept every letter he wrote, tied with a blue ribbon, in the drawer beneath the window.",
]
Find = Callable[[str], Bundle]


def _recipe(source: Path, plugins: list[Path], **changes: object) -> Recipe:
    recipe = {
        "name": "text",
        "backbone": {"source": str(source)},
        "plugins": [{"source": str(plugin)} for plugin in plugins],
        "targets": ["onnxruntime"],
        "speed": None,
    }
    return Recipe.model_validate(recipe | changes)


@pytest.fixture(scope="session")
def text_recipe(artefacts: Artefacts, load_model: Callable[..., Backbone]) -> Callable[..., Recipe]:
    """A recipe of a small model that generates text, with random plugins, by the model's name."""

    def find(name: str, ratios: tuple[int, ...] = RATIOS, **changes: object) -> Recipe:
        backbone = load_model(name)

        def save(ratio: int, folder: Path) -> None:
            masking = "exclude-padding" if ratio == 3 else "none"
            save_plugin(plugin_for(backbone, ratio, masking=masking), folder)

        plugins = [artefacts.folder(f"text/{name}/{k}", functools.partial(save, k)) for k in ratios]
        return _recipe(backbone.info.source.folder, plugins, **changes)

    return find


@pytest.fixture(scope="session")
def text_bundle(artefacts: Artefacts, text_recipe: Callable[..., Recipe]) -> Find:
    """A bundle of a small model that generates text, not to be changed."""

    def find(name: str) -> Bundle:
        return Bundle.load(artefacts.folder(f"bundles/{name}", functools.partial(build, text_recipe(name))))

    return find


def _inputs(rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Random tokens in rows of different length."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, rows)
    lengths[0] = length
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    return {
        "input_ids": np.where(mask > 0, rng.integers(103, VOCAB_SIZE, mask.shape), 0),
        "attention_mask": mask,
    }


def _rows(tokens: np.ndarray) -> list[list[int]]:
    """Generated rows as transformers returns them, without the start token and what follows the end."""
    rows = []
    for row in tokens[:, 1:].tolist():
        end = row.index(102) + 1 if 102 in row else len(row)
        rows.append(row[:end])
    return rows


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_every_ratio_generates_the_tokens_of_eager_pytorch(
    text_bundle: Find, load_model: Callable[..., Backbone], name: str
) -> None:
    bundle, backbone = text_bundle(name), load_model(name)
    session = bundle.session()
    assert session.ratios == (1, *RATIOS)
    texts = set()
    for variant in bundle.manifest.variants:
        eager = EagerModel(backbone, method_of(variant).eager(backbone, bundle.variant_files(variant)))
        alone = bundle.session(variant=variant.name)
        for seed, (rows, length) in enumerate(((5, 17), (1, 1), (3, variant.ratio + 1))):
            inputs = _inputs(rows, length, seed)
            for settings in (
                {"max_new_tokens": 10},
                {"max_new_tokens": 8, "num_beams": 3},
                {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
            ):
                expected = _rows(eager.generate(inputs, **settings))
                for one in (session, alone):
                    found = one.generate(inputs, variant.name, **settings)
                    assert [s.tolist() for row in found.tokens for s in row] == expected, (variant, settings)
        texts.add(str(expected))
    assert len(texts) == len(bundle.manifest.variants), "the ratio makes a difference"


def test_files_are_those_that_a_design_of_parts_promises(text_bundle: Find) -> None:
    bundle = text_bundle("t5-text")
    manifest = bundle.manifest
    assert manifest.any_ratio == {ENCODER: f"any-ratio_{ENCODER}.onnx", DECODER: f"{DECODER}.onnx"}
    for variant in manifest.variants:
        assert variant.graphs == {ENCODER: f"{variant.name}_{ENCODER}.onnx", DECODER: f"{DECODER}.onnx"}
    decoder = manifest.backbone.parts[DECODER]
    assert decoder.feeds["past_key_values.0.encoder.key"] == f"{ENCODER}.present.0.encoder.key"
    assert decoder.feeds["past_key_values.2.decoder.value"] == f"{DECODER}.present.2.decoder.value"
    assert decoder.inputs[-1].axes == ("batch_size", 4, "sequence_length", 6)
    assert manifest.backbone.task == "text2text-generation"
    assert "generation_config.json" in manifest.files


@pytest.mark.parametrize("name", ["t5-gated-text", "bart-text"])
def test_the_first_step_has_a_decoder_of_its_own_for_optimum(
    text_bundle: Find, load_model: Callable[..., Backbone], name: str
) -> None:
    """It fills a decoder's caches in the order of the inputs, layer by layer."""
    bundle, backbone = text_bundle(name), load_model(name)
    first, later = (
        onnxruntime.InferenceSession(bundle.file(f"{part}.onnx"), providers=["CPUExecutionProvider"])
        for part in ("decoder_model", DECODER)
    )
    past = [value.name for value in later.get_inputs() if "past" in value.name]
    assert past[:4] == [
        f"past_key_values.0.{s}.{k}" for s in ("decoder", "encoder") for k in ("key", "value")
    ]
    present = [value.name for value in first.get_outputs()]
    assert present == ["logits", *(n.replace("past_key_values", "present") for n in past)]
    inputs = _inputs(3, 7, 0)
    eager = EagerModel(backbone, None)
    states = eager.run(inputs)["last_hidden_state"]
    tokens = np.array([[5, 7]] * 3)
    mask = {"encoder_attention_mask": inputs["attention_mask"]}
    found = first.run(None, {**mask, "input_ids": tokens[:, :1], "encoder_hidden_states": states})
    caches = dict(zip(past, found[1:], strict=True))
    second = later.run(["logits"], {**mask, "input_ids": tokens[:, 1:], **caches})[0]
    expected = eager.scores(inputs, tokens)
    np.testing.assert_allclose(np.concatenate([found[0], second], axis=1), expected, atol=2e-4)


@pytest.mark.parametrize("name", ["t5-text", "t5-gated-text", "bart-text"])
def test_every_weight_is_stored_once(
    text_bundle: Find, load_model: Callable[..., Backbone], name: str
) -> None:
    bundle, backbone = text_bundle(name), load_model(name)
    with safe_open(bundle.file("weights.safetensors"), "np") as file:
        names = list(file.keys())
        contents = [file.get_tensor(n).tobytes() for n in names]
    by_content: dict[bytes, list[str]] = {}
    for found, content in zip(names, contents, strict=True):
        by_content.setdefault(content, []).append(found)
    # Layer norms of ones and biases of zeros are equal to each other by chance.
    assert not [same for content, same in by_content.items() if len(same) > 1 and len(content) > 4 * 64]
    parameters = sum(p.numel() for p in backbone.model.parameters())
    stored = sum(len(content) for content in contents) / 4
    assert stored <= parameters + VOCAB_SIZE, "the bias of BART's scores is a buffer"
    for graph in sorted(bundle.path.glob("*.onnx")):
        model = ir.load(graph)
        for value in model.graph.initializers.values():
            stored_outside = isinstance(value.const_value, ir.ExternalTensor)
            assert stored_outside or value.const_value is None or value.const_value.nbytes < 64 * 1024


def test_the_savings_count_what_is_not_compressed(text_bundle: Find) -> None:
    bundle = text_bundle("t5-text")
    size = bundle.manifest.backbone.encoder_size
    assert size.cross_size == 2 * 3 * 24
    for variant in bundle.manifest.variants:
        bottleneck = variant.plugin.bottleneck_size if variant.plugin else 0
        expected = analytic_macs(size, 2, 24, variant.ratio, bottleneck)
        found = graph_macs(bundle.graph(variant.graphs[ENCODER]), 2, 24, variant.ratio)
        assert found == pytest.approx(expected, rel=0.02)


# From text to text.


def test_texts_are_those_of_transformers(text_bundle: Find, load_model: Callable[..., Backbone]) -> None:
    bundle, backbone = text_bundle("bart-text"), load_model("bart-text")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle.path)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        found = backbone.model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=9
        )
    expected = tokenizer.batch_decode(found, skip_special_tokens=True)
    assert bundle.generate(TEXTS, 1, max_new_tokens=9) == expected
    assert bundle.generate(TEXTS, 1, max_new_tokens=9, batch_size=1) == expected
    assert bundle.generate(TEXTS[1], 1, max_new_tokens=9) == expected[1]
    assert "".join(bundle.generate_stream(TEXTS[0], 1, max_new_tokens=9)) == expected[0]
    several = bundle.generate(TEXTS, 4, max_new_tokens=5, num_beams=2, num_return_sequences=2)
    assert [len(row) for row in several] == [2] * 4


def test_run_prints_the_text_as_it_comes(text_bundle: Find, tmp_path: Path) -> None:
    bundle = text_bundle("bart-text")
    expected = bundle.generate(TEXTS, 4, max_new_tokens=6)
    arguments = ("run", str(bundle.path), "--ratio", "4", "--max-new-tokens", "6")
    assert call(*arguments, "--text", TEXTS[0]).stdout.strip() == expected[0].strip()
    document = json.loads(
        call(*arguments, *(part for t in TEXTS for part in ("--text", t)), "--format", "json").stdout
    )
    assert [result["generated"] for result in document["results"]] == expected
    lines = tmp_path / "found.jsonl"
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    call(*arguments, "--input", str(tmp_path / "texts.txt"), "--output", str(lines))
    assert [json.loads(line)["generated"] for line in lines.read_text().splitlines()] == expected
    table = call(*arguments, "--text", TEXTS[0], "--num-beams", "2", "--generation", "length_penalty=0.5")
    assert "generated" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--generation", "num_beam=2"), "Did you mean 'num_beams'?"),
        (("--generation", "num_beams"), "not NAME=VALUE"),
        (("--generation", "num_beams=2", "--num-beams", "2"), "given twice"),
        (("--generation", "temperature=0.5"), "no effect without do_sample"),
        (("--max-new-tokens", "65"), "positions for 64"),
        (("--pair", "b"), "neither --pair nor"),
        (("--output", "vectors.npy"), "not text"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_run_refuses_what_makes_no_sense(text_bundle: Find, arguments: tuple[str, ...], words: str) -> None:
    result = call("run", str(text_bundle("bart-text").path), "--text", "a", *arguments)
    assert result.returncode in (1, 2)
    assert words in result.stderr


def test_generation_settings_are_for_models_that_generate(small_bundle: Path) -> None:
    result = call("run", str(small_bundle), "--text", "a", "--num-beams", "2")
    assert (result.returncode, "does not generate text" in result.stderr) == (2, True)
    with pytest.raises(UserError, match="does not generate text"):
        Bundle.load(small_bundle).generate(["a"])


def test_an_empty_row_is_refused(text_bundle: Find) -> None:
    inputs = _inputs(3, 5, 0)
    inputs["attention_mask"][1] = 0
    with pytest.raises(UserError, match="Row 2 of the inputs has no token"):
        text_bundle("t5-text").session().generate(inputs)


def test_what_a_model_that_generates_does_not_have_is_refused(
    text_recipe: Callable[..., Recipe], tmp_path: Path, small_model: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match="cannot be quantised"):
        build(text_recipe("t5-text", (2,), precision="int8"), tmp_path / "int8")
    source = tmp_path / "contrastive"
    shutil.copytree(small_model("t5-text"), source)
    settings = source / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"penalty_alpha": 0.6}))
    with pytest.raises(UserError, match=r"sets penalty_alpha to 0\.6"):
        build(_recipe(source, []), tmp_path / "contrastive-bundle")
    assert not any((tmp_path / name).exists() for name in ("int8", "contrastive-bundle"))


@pytest.mark.parametrize(
    "command",
    [
        ("report",),
        ("serve", "--allow-unknown-quality"),
        ("export-triton", "--output", "repository"),
        ("verify", "--target", "openvino"),
    ],
    ids=lambda command: command[0],
)
def test_commands_that_do_not_know_generation_say_so(
    text_bundle: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.tsv").write_text("text\na\nb\n")
    result = call(command[0], str(text_bundle("t5-text").path), *command[1:])
    assert result.returncode == 1
    assert "generates text, which" in result.stderr, result.stderr


def test_verify_and_inspect_know_the_decoder(text_bundle: Find, tmp_path: Path) -> None:
    path = str(shutil.copytree(text_bundle("t5-text").path, tmp_path / "bundle"))
    result = call("verify", path, "--reference", "eager", "--ratio", "4", "--quick")
    assert result.returncode == 0, result.stderr
    assert "generates the tokens of eager" in result.stdout
    assert "a row alone, with less padding" in result.stdout
    assert call("verify", path, "--reference", "stored").returncode == 0
    shown = call("inspect", path).stdout
    assert "decoder: decoder_with_past_model.onnx" in shown
    assert "keys and values for the decoder" in shown


# The build.


def test_a_stored_reference_says_that_it_has_no_decoder(text_bundle: Find) -> None:
    path = str(text_bundle("t5-text").path)
    result = call("verify", path, "--reference", "stored", "--ratio", "2", "--format", "json")
    left = json.loads(result.stdout)["left_out"]["ratio-2"]
    assert {(entry["graph"], entry["check"]) for entry in left} >= {
        (f"{DECODER}.onnx", check) for check in (FORCED, ALONE, GREEDY)
    }


def test_a_decoder_that_was_exchanged_is_refused(text_bundle: Find, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(text_bundle("t5-text").path, folder)
    _scale_product(folder / f"{DECODER}.onnx", "decoder.block.1.layer.2.DenseReluDense.wo")
    sign(folder, steps=False)
    result = call("verify", str(folder), "--reference", "stored", "--ratio", "2")
    assert (result.returncode, f"{DECODER}.onnx" in result.stderr) == (3, True), result.stderr


def test_every_ratio_is_evaluated_on_the_text_that_it_generates(text_bundle: Find, tmp_path: Path) -> None:
    shutil.copytree(text_bundle("t5-text").path, tmp_path / "bundle")
    bundle, data = Bundle.load(tmp_path / "bundle"), tmp_path / "texts.jsonl"
    generated = bundle.generate(TEXTS, 1, max_new_tokens=6, num_beams=2)
    references: list[Any] = [*generated[:2], ["something else", generated[2]], "never this"]
    lines = [json.dumps({"text": t, "right": r}) for t, r in zip(TEXTS, references, strict=True)]
    data.write_text("\n".join(lines) + "\n")
    arguments = ["evaluate", bundle.path, "--data", data, "--label-column", "right", "--format", "json"]
    settings = ["--max-new-tokens", 6, "--num-beams", 2]
    output = call(*map(str, (*arguments, *settings)))
    assert output.returncode == 0, output.stderr
    quality = json.loads(output.stdout)
    assert (quality["task"], quality["metric"]) == ("text2text-generation", "rouge_l")
    assert quality["data"]["generation"] == {"max_new_tokens": 6, "num_beams": 2}
    first = quality["rows"][0]
    assert (first["ratio"], first["metrics"]["exact_match"], first["metrics"]["agreement"]) == (1, 0.75, 1.0)
    assert len(quality["rows"]) == 2 * (1 + len(RATIOS))
    assert {found["same_texts"] for found in quality["agreement"].values()} == {1.0}
    by_ratio = {row["ratio"]: row["metrics"]["agreement"] for row in quality["rows"]}
    for ratio in RATIOS:
        texts = bundle.generate(TEXTS, ratio, max_new_tokens=6, num_beams=2)
        assert by_ratio[ratio] == np.mean([a == b for a, b in zip(texts, generated, strict=True)])
    # Every setting that is asked for is one that generates, on both runtimes.
    changed = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 1, "bad_words_ids": [[107, 108], [110]]}
    given = [part for k, v in changed.items() for part in ("--generation", f"{k}={json.dumps(v)}")]
    other = json.loads(call(*map(str, (*arguments, *settings, *given))).stdout)
    texts = bundle.generate(TEXTS, 1, max_new_tokens=6, num_beams=2, **changed)
    assert texts != generated
    found = other["rows"][0]["metrics"]["exact_match"]
    accepted = [right if isinstance(right, list) else [right] for right in references]
    assert found == np.mean(
        [t.strip() in [r.strip() for r in a] for t, a in zip(texts, accepted, strict=True)]
    )
    assert {same["same_texts"] for same in other["agreement"].values()} == {1.0}
    for changes, words in (
        (("--generation", "num_return_sequences=2", "--num-beams", "2"), "one text for each input"),
        (("--generation", "do_sample=true"), "Sampled text differs from run to run"),
        (("--generation", "num_beam=2"), "Did you mean 'num_beams'?"),
        (("--pair-column", "text"), "read one text, not a pair"),
        (("--label-column", "nothing"), "no column 'nothing'"),
    ):
        refused = call(*map(str, (*arguments, *changes)))
        assert refused.returncode == 1, changes
        assert words in refused.stderr
    lines[1] = json.dumps({"text": "x", "right": []})
    data.write_text("\n".join(lines))
    assert "line 2 has no reference" in call(*map(str, arguments)).stderr


def test_settings_of_generation_are_for_text(small_bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.tsv"
    data.write_text("text\nOne.\nTwo.\n")
    refused = call("evaluate", str(small_bundle), "--data", str(data), "--max-new-tokens", "5")
    assert refused.returncode == 1
    assert "generates no text, so max_new_tokens would not be used" in refused.stderr


def test_a_build_publishes_no_ratio_that_loses_too_much_text(
    text_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    data = tmp_path / "texts.jsonl"
    plain = Bundle.load(build(text_recipe("t5-text", (2,)), tmp_path / "bundle").bundle)
    texts = plain.generate(TEXTS, 1, max_new_tokens=6)
    data.write_text(
        "".join(json.dumps({"text": t, "label": r}) + "\n" for t, r in zip(TEXTS, texts, strict=True))
    )
    quality = {"data": str(data), "generation": {"max_new_tokens": 6}, "max_loss": 0.0}
    recipe = text_recipe("t5-text", (2,), quality=quality)
    with pytest.raises(NumbersDisagreeError, match=r"loses .* of rouge_l on texts\.jsonl"):
        build(recipe, tmp_path / "bundle")
    wrong = text_recipe("t5-text", (2,), quality=quality | {"generation": {"nothing": 6}})
    with pytest.raises(UserError, match="There is no generation setting"):
        build(wrong, tmp_path / "bundle")


def test_another_ratio_traces_nothing(text_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    build(text_recipe("t5-text", (2,)), tmp_path / "bundle")
    result = build(text_recipe("t5-text", (2, 4)), tmp_path / "bundle")
    made = {step.name for step in result.steps if step.action == "made"}
    assert made == {
        "plugin/ratio-4",
        "bind/ratio-4",
        "verify/ratio-4",
        "generate/ratio-4",
    }
    again = build(text_recipe("t5-text", (2, 4)), tmp_path / "bundle")
    assert not again.published


@pytest.mark.parametrize("name", ["t5-gated-text", "bart-text"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_is_built_and_verified(
    text_recipe: Callable[..., Recipe], tmp_path: Path, name: str, precision: str
) -> None:
    build(text_recipe(name, (2,), precision=precision), tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")
    cached = next(t for t in bundle.manifest.backbone.parts[DECODER].inputs if "past" in t.name)
    assert cached.dtype == precision
    if precision == "float16":
        assert bundle.generate(TEXTS, 2, max_new_tokens=4)
        decoder = bundle.path / f"{DECODER}.onnx"
        kept = read_backbone_info(resolve_source(bundle.manifest.backbone.source)).spec.family.float32_modules
        counted = {module_of(node): node.name for node in ir.load(decoder).graph}
        left_out = [counted[module] for module in counted if module.rpartition(".")[2] in kept]
        assert bool(left_out) is bool(kept)
        assert not set(left_out) & set(macs_by_node(decoder, kept, 1)), (
            "an engine may compute them in float32"
        )


def test_a_fault_in_a_decoder_layer_ends_the_build(
    text_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trace_decoder.DecoderStep.forward

    def shifted(self: Any, encoder_attention_mask: Any, input_ids: Any, own: Any, cross: Any) -> Any:
        return whole(self, encoder_attention_mask, input_ids, own, [*cross[:-1], cross[-1] * 1.01])

    monkeypatch.setattr(trace_decoder.DecoderStep, "forward", shifted)
    monkeypatch.setattr(trace, "trace", trace.trace.without_store)
    with pytest.raises(NumbersDisagreeError, match=r"agrees along given tokens|a row alone"):
        build(text_recipe("t5-text", (2,)), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_padding_that_changes_the_scores_is_found(text_bundle: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together the rows are right; a row alone, with less padding, is not."""
    whole = decoder.open_for_verification

    class Longer:
        def __init__(self, runner: Any) -> None:
            self._runner = runner

        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = self._runner.run(inputs)
            if (
                "input_ids" in inputs
                and "encoder_attention_mask" not in inputs
                and len(inputs["input_ids"]) == 1
            ):
                found = {name: values * np.float32(1.01) for name, values in found.items()}
            return found

    monkeypatch.setattr(decoder, "open_for_verification", lambda *a: Longer(whole(*a)))
    result = call("verify", str(text_bundle("t5-text").path), "--ratio", "2", "--format", "json")
    assert result.returncode == 3, result.stderr
    of_graphs = json.loads(result.stdout)["findings"].values()
    failed = {finding["check"] for findings in of_graphs for finding in findings if not finding["passed"]}
    assert failed == {"a row alone, with less padding"}


def test_float16_keeps_what_overflows_in_float32(
    text_recipe: Callable[..., Recipe], load_model: Callable[..., Backbone], tmp_path: Path
) -> None:
    """T5's feed-forward networks exceed float16 (transformers keeps `wo` in float32, and so do graphs)."""
    source = load_model("t5-text")
    model = source.to_dtype(torch.float32).model
    inputs = _inputs(3, 12, 0)
    largest: list[float] = []
    for module in model.encoder.modules():
        if type(module).__name__ == "T5DenseActDense":
            module.register_forward_hook(lambda _m, _i, found: largest.append(float(found.abs().max())))
    EagerModel(dataclasses.replace(source, model=model), None).run(inputs)
    factor = math.sqrt(1.5e5 / max(largest))
    for name, weight in model.encoder.named_parameters():
        if name.endswith((".wi.weight", ".wo.weight")):
            weight.mul_(factor)
            assert weight.abs().max() < 65504, "the weights themselves fit"
    model.save_pretrained(tmp_path / "model")
    copy_tokenizer(source.info.source.folder, tmp_path / "model")
    info = read_backbone_info(resolve_source(str(tmp_path / "model")))
    large = load_backbone(info, source.pad_token_id)
    expected = EagerModel(large, None).run(inputs)["last_hidden_state"]

    def error(found: np.ndarray) -> float:
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    kept, lost = (large.to_dtype(torch.float16, keeps_float32_modules=keeps) for keeps in (True, False))
    assert error(EagerModel(kept, None).run(inputs)["last_hidden_state"]) < 0.02
    assert error(EagerModel(lost, None).run(inputs)["last_hidden_state"]) > 0.1
    recipe = text_recipe("t5-text", (2,), precision="float16", backbone={"source": str(tmp_path / "model")})
    recipe = recipe.model_copy(
        update={"plugins": (PluginRecipe(ratio=2, initialise=Initialise(bottleneck_size=4)),)}
    )
    bundle = Bundle.load(build(recipe, tmp_path / "bundle").bundle)
    assert error(bundle.session().run(inputs, 1)["last_hidden_state"]) < 0.02


# Label words: a classifier made of a model that generates text.

WORDS = {"POS": "good", "NEG": "bad"}


@pytest.mark.parametrize(
    ("name", "prompt"), [("t5-gated-text", ""), ("mt5-text", "the"), ("bart-text", "the")]
)
def test_label_words_make_a_classifier(
    text_recipe: Callable[..., Recipe],
    load_model: Callable[..., Backbone],
    tmp_path: Path,
    name: str,
    prompt: str,
) -> None:
    """The graph goes from ids to the scores of the words; the build compares them with transformers' own."""
    backbone = load_model(name)
    source = {"source": str(backbone.info.source.folder), "label_words": WORDS, "decoder_prompt": prompt}
    bundle = Bundle.load(build(text_recipe(name, (2, 3), backbone=source), tmp_path / "bundle").bundle)
    entry = bundle.manifest.backbone
    assert (entry.task, entry.outputs, entry.generates) == ("text-classification", ("logits",), False)
    assert (entry.label_words, entry.decoder_prompt) == (WORDS, prompt)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle.path)
    start = [
        backbone.info.config.decoder_start_token_id,
        *tokenizer(prompt, add_special_tokens=False).input_ids,
    ]
    words = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in WORDS.values()]
    inputs = _inputs(4, 11, 0)
    for variant in bundle.manifest.variants:
        eager = EagerModel(backbone, method_of(variant).eager(backbone, bundle.variant_files(variant)))
        expected = eager.scores(inputs, np.array([start] * 4))[:, -1, words]
        found = bundle.session().run(inputs, variant.name)["logits"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # The decoder's keys and values are counted, so that the limit of the speed-up is that of the graph.
    assert entry.encoder_size.cross_size > 0
    prediction = bundle.predict("A fine film.", 3)
    assert set(prediction["scores"]) == set(WORDS)
    data = tmp_path / "labels.tsv"
    data.write_text("text\tlabel\nA fine film.\tPOS\nNever again.\tNEG\n")
    evaluated = call(
        "evaluate", str(bundle.path), "--data", str(data), "--label-column", "label", "--format", "json"
    )
    assert json.loads(evaluated.stdout)["task"] == "classification"
    with pytest.raises(UserError, match="is a bundle, which has its own label words"):
        evaluate(bundle.path, read_examples(data, Columns()), label_words=WORDS)
    shown = call("inspect", str(bundle.path)).stdout
    assert "label words: POS=good, NEG=bad" in shown
    assert ("after the prompt" in shown) is bool(prompt)
    verified = call("verify", str(bundle.path), "--format", "json")
    assert verified.returncode == 0, verified.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_words": {"POS": "unfathomably", "NEG": "bad"}}, "has .* tokens"),
        ({"label_words": {"POS": "good", "NEG": "good"}}, "are the same token"),
        ({"label_words": {"POS": "good"}}, "needs at least two label words"),
        ({"decoder_prompt": "the"}, "there are no label words"),
        ({"label_words": WORDS, "task": "feature-extraction"}, "need a model that generates text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_label_words_that_cannot_be_are_refused(
    text_recipe: Callable[..., Recipe], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    recipe = text_recipe("t5-text", (2,))
    wrong = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update=changes)})
    with pytest.raises(UserError, match=words):
        build(wrong, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_label_words_on_the_command_line(
    text_recipe: Callable[..., Recipe], load_model: Callable[..., Backbone], tmp_path: Path
) -> None:
    """Words that are their own labels; plugins are trained on their scores."""
    folder = str(load_model("t5-text").info.source.folder)
    plugin = str(text_recipe("t5-text").plugins[0].source)
    data = tmp_path / "labels.tsv"
    data.write_text("text\tlabel\n" + "A fine film.\tgood\nNever again.\tbad\n" * 12)
    words = ("--label-word", "good", "--label-word", "bad")
    trained = call(
        *("train", "adapt", "--backbone", folder, "--plugin", plugin, "--data", str(data), *words),
        *("--label-column", "label", "--loss", "logits=1", "--loss", "label=1", "--steps", "2"),
        *("--batch-size", "4", "--held-out", "0.2", "--output", str(tmp_path / "trained")),
    )
    assert trained.returncode == 0, trained.stderr
    plugin = str(tmp_path / "trained" / "ratio-2")
    evaluated = call(
        *("evaluate", plugin, "--backbone", folder, "--data", str(data), "--label-column", "label", *words),
        *("--output", str(tmp_path / "kept"), "--format", "json"),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["metric"] == "accuracy"
    again = call("evaluate", str(tmp_path / "kept"), "--data", str(data), "--label-column", "label", *words)
    assert (again.returncode, "has its own label words" in again.stderr) == (2, True)
    arguments = ("build", "--backbone", folder, "--plugin", plugin, *words)
    built = call(*arguments, "--target", "onnxruntime", "--no-speed", "--output", str(tmp_path / "bundle"))
    assert built.returncode == 0, built.stderr
    assert Bundle.load(tmp_path / "bundle").manifest.backbone.label_words == {"good": "good", "bad": "bad"}
    for changed in ((), ("--label-word", "bad", "--label-word", "good")):
        kept = (*arguments[:5], *changed, "--target", "onnxruntime", "--no-speed")
        refused = call(*kept, "--output", str(tmp_path / "bundle"))
        assert (refused.returncode, "label words are good=good, bad=bad" in refused.stderr) == (1, True)
    decoder = call(
        *("train", "adapt", "--backbone", folder, "--plugin", plugin, "--data", str(data), *words),
        *("--label-column", "label", "--loss", "decoder=1", "--output", str(tmp_path / "none")),
    )
    assert (decoder.returncode, "no term decoder" in decoder.stderr) == (1, True), decoder.stderr
    for wrong, said in (
        (("--label-word", "a="), "[LABEL=]WORD"),
        ((*words, "--label-word", "bad=x"), "given twice"),
    ):
        refused = call("build", "--backbone", folder, *wrong, "--output", str(tmp_path / "other"))
        assert (refused.returncode, said in refused.stderr) == (2, True), refused.stderr


def test_label_words_of_a_layer_replace_those_below(tmp_path: Path) -> None:
    """And a printed recipe is a recipe, whatever the labels look like."""
    base, above = tmp_path / "base.yaml", tmp_path / "above.yaml"
    base.write_text(
        "name: base\nbackbone: {source: ./t5, label_words: {'1': good, '0': bad}}\nplugins: []\n"
        "quality: {data: dev.tsv, max_loss: 0.1}\n"
    )
    above.write_text("extends: base.yaml\nname: above\nbackbone: {label_words: {'yes': fine, 'no': poor}}\n")
    found = load_recipe(str(above))
    assert found.backbone.label_words == {"yes": "fine", "no": "poor"}
    for path in (base, above):
        printed = tmp_path / f"printed-{path.name}"
        printed.write_text(resolve_recipe(str(path), []).to_yaml())
        again, first = load_recipe(str(printed)), load_recipe(str(path))
        assert again.backbone.label_words == first.backbone.label_words
        assert again.quality is not None
        assert again.quality.generation == {}


def test_static_int8_calibrates_the_encoder_of_label_words(
    text_recipe: Callable[..., Recipe], load_model: Callable[..., Backbone], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.tsv"
    texts.write_text("text\n" + "".join(f"{text} {i}\n" for i in range(20) for text in TEXTS))
    source = {"source": str(load_model("t5-gated-text").info.source.folder), "label_words": WORDS}
    quantization = {"calibration": {"data": str(texts)}, "min_cosine": -1, "min_agreement": 0}
    recipe = text_recipe(
        "t5-gated-text", (2,), backbone=source, precision="int8-static", quantization=quantization
    )
    bundle = Bundle.load(build(recipe, tmp_path / "bundle").bundle)
    assert bundle.manifest.precision == "int8-static"


def _scale_product(graph: Path, module: str, by: float = 1.01) -> None:
    """Make the product of a module that many times what it should be."""
    model = ir.load(graph)
    (node,) = [n for n in model.graph if n.op_type == "MatMul" and module_of(n) == module]
    factor = ir.Value(name="planted", const_value=ir.tensor(np.array(by, np.float32), name="planted"))
    model.graph.initializers.add(factor)
    product = node.outputs[0]
    scaled = ir.Node("", "Mul", [product, factor], name="planted", metadata_props=dict(node.metadata_props))
    scaled.outputs[0].name, scaled.outputs[0].dtype = "planted.product", product.dtype
    ir.convenience.replace_all_uses_with(product, scaled.outputs[0])
    scaled.replace_input_with(0, product)
    model.graph.insert_after(node, scaled)
    ir.save(model, graph)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("t5-gated-text", "decoder.block.1.layer.2.DenseReluDense.wo"),
        ("t5-gated-text", "decoder.block.0.layer.1.EncDecAttention.o"),
        ("bart-text", "model.decoder.layers.0.fc2"),
    ],
)
def test_bisection_names_the_decoder_layer(text_bundle: Find, tmp_path: Path, name: str, module: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(text_bundle(name).path, folder)
    _scale_product(folder / f"{DECODER}.onnx", module)
    sign(folder)
    out = tmp_path / "faults"
    found = call("verify", str(folder), "--ratio", "2", "--quick", "--bisect", "--reproduction", str(out))
    assert found.returncode == 3, found.stderr
    shown = " ".join(found.stdout.split()) + " ".join(found.stderr.split())
    assert f"the first module that exceeds its budget is {module}" in shown
    script = out / "ratio-2" / f"{DECODER}.onnx" / "reproduce.py"
    again = subprocess.run(
        [sys.executable, script.name], cwd=script.parent, capture_output=True, text=True, check=False
    )
    error = re.search(r"relative Frobenius error (\S+)", again.stdout)
    assert error is not None, again.stderr
    assert float(error[1]) == pytest.approx(0.01, rel=0.1)


def test_verify_names_the_token_at_which_rows_part(text_bundle: Find, tmp_path: Path) -> None:
    folder, table = tmp_path / "bundle", tmp_path / "table.md"
    shutil.copytree(text_bundle("t5-gated-text").path, folder)
    _scale_product(folder / f"{DECODER}.onnx", "decoder.block.1.layer.2.DenseReluDense.wo", by=-3)
    sign(folder)
    command = ("verify", str(folder), "--ratio", "2", "--quick", "--summary", str(table), "--format", "json")
    found = call(*command)
    assert found.returncode == 3, found.stderr
    partings = json.loads(found.stdout)["partings"]["ratio-2"]
    first = partings[0]
    assert (first["step"], first["is_tie"]) == (0, False)
    assert first["found"] != first["expected"]
    words = (
        f"case {first['case']}, row {first['row'] + 1}: token 1 is {first['found']}, not {first['expected']}"
    )
    assert words in table.read_text()
    right = call(
        "verify", str(text_bundle("t5-gated-text").path), "--ratio", "2", "--quick", "--format", "json"
    )
    assert json.loads(right.stdout)["partings"] == {}
