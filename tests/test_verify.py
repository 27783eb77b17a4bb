"""Verification: a correct bundle passes, every planted fault is caught, and what is told is true."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest
import torch
from artefacts import Artefacts
from conftest import BLOCK
from planted_faults import FAULTS, plant
from signed import sign

from variator_export.building.recipe_build import build
from variator_export.bundle.manifest import MANIFEST_NAME, Variant
from variator_export.cli.app import make_app
from variator_export.core.errors import NumbersDisagreeError, UsageError, UserError
from variator_export.core.precision import FLOAT32
from variator_export.core.progress import Progress
from variator_export.engines.base import Arrays, Runner
from variator_export.engines.eager import EagerModel
from variator_export.graph.modules import module_outputs
from variator_export.model.backbone import Backbone
from variator_export.model.plugin_file import load_plugin, save_plugin
from variator_export.recipe.recipe import Recipe
from variator_export.sessions import Bundle
from variator_export.verification.bisection.bisect import Bisection, BisectSubject
from variator_export.verification.bundle_verification import STORED, Verification, verify
from variator_export.verification.cases import REAL_TEXT, Case
from variator_export.verification.eager_bundle import EagerBundle
from variator_export.verification.invariances import (
    CHECKS,
    EQUAL_ROWS,
    PADDING,
    ROW_ALONE,
    ROW_ORDER,
    check_invariances,
)
from variator_export.verification.judging.averages import AVERAGE, BIAS
from variator_export.verification.judging.compare import argmax_agreement, deviation, rank_correlation
from variator_export.verification.judging.error_budget import Budget, make_budgets, make_pooled_budgets
from variator_export.verification.judging.expected import Expected, judge_carefully
from variator_export.verification.judging.judge import REFERENCE, Finding, Question, judge
from variator_export.verification.reference import load_reference, save_reference
from variator_export.verification.reference_check import verify_graph
from variator_export.verification.runs import Graphs

WRONG_RATIO = "a plugin of the wrong ratio"
PAGE = Path(__file__).parent.parent / "docs" / "verification.md"


@pytest.fixture
def faulty(embedding_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the small embedding model's bundle, to be damaged."""
    shutil.copytree(embedding_bundle, tmp_path / "faulty")
    return tmp_path / "faulty"


@pytest.fixture(scope="module")
def masked_bundle(artefacts: Artefacts, embedding_model: Path, embedding_plugins: dict[int, Path]) -> Path:
    """As the bundle of the small embedding model, but its plugin of ratio 4 excludes padding."""

    def make(folder: Path) -> None:
        plugin = load_plugin(embedding_plugins[4])
        config = dataclasses.replace(plugin.config, masking="exclude-padding")
        save_plugin(dataclasses.replace(plugin, config=config), folder / "plugin")
        recipe = {"name": "masked", "backbone": {"source": str(embedding_model)}, "speed": None}
        plugins = [{"source": str(folder / "plugin")}]
        build(Recipe.model_validate({**recipe, "plugins": plugins}), folder / "bundle")

    return artefacts.folder("bundles/masked", make) / "bundle"


def _failed_checks(result: Verification) -> set[str]:
    return {finding.question.check for finding in result.failures}


@pytest.mark.parametrize("reference", ["eager", "stored"])
def test_a_correct_bundle_passes(embedding_bundle: Path, reference: Any) -> None:
    result = verify(embedding_bundle, reference=reference, profile_shapes="none")
    assert result.failures == []
    assert set(result.findings) == {"ratio-1", "ratio-2", "ratio-4"}
    checks = {(f.question.graph, f.question.check, f.question.output) for f in result.findings["ratio-4"]}
    assert len(checks) == 2 * 7 * 2  # both graphs, seven checks, two outputs
    assert result.left_out == {}
    # The limit is no loose one: eager's own rounding and the graph's are of one size.
    worst = max(f.severity for found in result.findings.values() for f in found)
    assert 0.3 < worst <= 4


def test_the_profile_of_the_engines_is_verified_too(embedding_bundle: Path) -> None:
    """(8, 128) and (32, 512) are cut to the model's limit, as engines are."""

    def shapes(choice: Any) -> set[tuple[int, int]]:
        result = verify(embedding_bundle, [4], reference="eager", profile_shapes=choice)
        return {f.question.input_shape for f in result.findings["ratio-4"]}

    everything, usual, none = shapes("all"), shapes(None), shapes("none")
    assert everything - usual == {(32, 64)}
    assert {(1, 1), (8, 64)} <= usual
    assert usual - none >= {(8, 64)}
    assert max(length for _, length in everything) == 64


def test_shapes_are_drawn_from_a_seed(embedding_bundle: Path) -> None:
    def drawn(seed: int | None) -> dict[str, tuple[int, int]]:
        result = verify(embedding_bundle, [2], reference="eager", profile_shapes="none", seed=seed)
        assert result.passed
        found = {f.question.case: f.question.input_shape for f in result.findings["ratio-2"]}
        return {case: shape for case, shape in found.items() if case.startswith("drawn ")}

    assert drawn(None) == {}
    first = drawn(7)
    assert len(first) == 12
    assert drawn(7) == first
    assert drawn(8) != first
    with pytest.raises(UserError, match="New shapes need eager PyTorch"):
        verify(embedding_bundle, reference="stored", seed=1)
    with pytest.raises(UsageError, match="--quick and --full were both given"):
        make_app()(["verify", str(embedding_bundle), "--quick", "--full"], standalone_mode=False)


def test_rows_are_independent_where_a_plugin_excludes_padding(masked_bundle: Path) -> None:
    assert Bundle.load(masked_bundle).variant(4).plugin.masking == "exclude-padding"  # type: ignore[union-attr]
    result = verify(masked_bundle, [4], profile_shapes="none")
    assert result.failures == []
    assert {f.question.check for f in result.findings["ratio-4"]} == {REFERENCE, AVERAGE, BIAS, *CHECKS}


class _Lacks:
    """A runner that lacks an output."""

    def __init__(self, output: str, runner: Runner) -> None:
        self._output, self._runner = output, runner

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        return {name: array for name, array in self._runner.run(inputs).items() if name != self._output}


def test_a_missing_output_is_a_failure_of_every_check(embedding_bundle: Path) -> None:
    bundle = Bundle.load(embedding_bundle)
    stored = load_reference(embedding_bundle / "reference" / "ratio-4.safetensors")
    runner = _Lacks("sentence_embedding", bundle.session(variant=4))
    backbone = bundle.manifest.backbone
    one_row = next(expected for expected in stored if expected.case.shape[0] == 1)
    found, left_out = check_invariances(
        "x",
        runner,
        one_row,
        ratio=4,
        pad_token_id=backbone.pad_token_id,
        token_outputs=backbone.token_outputs,
        max_length=backbone.max_length,
    )
    assert left_out == {}
    assert {f.question.input_shape for f in found} == {(4, one_row.case.shape[1])}
    for findings in (found, verify_graph("x", runner, stored)):
        failed = [f for f in findings if not f.passed]
        assert {f.question.output for f in failed} == {"sentence_embedding"}
        assert {f.problem for f in failed} == {"the output is missing"}
        # An output that failed has no average.
        assert {f.question.check for f in failed} == {f.question.check for f in findings} - {AVERAGE, BIAS}


def test_an_output_of_another_shape_is_a_failure(embedding_bundle: Path) -> None:
    class Longer(_Lacks):
        def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
            found = self._runner.run(inputs)
            return {**found, self._output: np.concatenate([found[self._output]] * 2, axis=-1)}

    stored = load_reference(embedding_bundle / "reference" / "ratio-4.safetensors")
    runner = Longer("sentence_embedding", Bundle.load(embedding_bundle).session(variant=4))
    problems = {f.problem for f in verify_graph("x", runner, stored) if not f.passed}
    assert "the output has the shape (7, 64), expected (7, 32)" in problems
    assert len(problems) == len({expected.case.shape[0] for expected in stored})


@pytest.mark.parametrize(("error", "passes"), [(1e-6, True), (1e-4, False)], ids=["rounding", "fault"])
def test_a_row_of_small_values_is_not_more_exact_than_the_others(
    embedding_bundle: Path, error: float, passes: bool
) -> None:
    """The logits of a text between two classes are near 0, and round as the other rows' do."""
    stored = load_reference(embedding_bundle / "reference" / "ratio-4.safetensors")
    case = next(expected for expected in stored if expected.case.name == REAL_TEXT).case
    logits = np.linspace(8, 0.1, len(case.inputs["input_ids"]))[:, None] * [1.0, -1.0]
    rows = {tokens: index for index, tokens in enumerate(_tokens_of_rows(case.inputs))}

    class Classifier:
        def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
            chosen = [rows[tokens] for tokens in _tokens_of_rows(inputs)]
            return {"logits": logits[chosen] + error * inputs["input_ids"].shape[1] / case.shape[1]}

    found, _ = check_invariances(
        "x",
        Classifier(),
        Expected(case, {"logits": logits}, {"logits": Budget(1e-7, 1e-7, 1e-7)}),
        ratio=4,
        pad_token_id=0,
        token_outputs=(),
        max_length=None,
    )
    assert {f.question.check: f.passed for f in found} == {**dict.fromkeys(CHECKS, True), PADDING: passes}


def _tokens_of_rows(inputs: Mapping[str, np.ndarray]) -> list[bytes]:
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [ids[mask > 0].tobytes() for ids, mask in rows]


@pytest.mark.parametrize(
    ("batches", "lengths", "shape", "left_out"),
    [
        (range(1, 9), range(1, 65), None, set()),
        (range(4, 5), range(16, 17), (4, 16), {ROW_ALONE, PADDING}),
        (range(16, 33), range(64, 65), (16, 64), {ROW_ALONE, PADDING}),
        (range(1, 2), range(1, 65), (1, None), {EQUAL_ROWS, ROW_ORDER, ROW_ALONE}),
        (range(500, 600), range(1, 65), None, {EQUAL_ROWS, ROW_ORDER, ROW_ALONE, PADDING}),
    ],
)
def test_rows_are_brought_into_a_shape_that_is_taken(
    embedding_bundle: Path,
    batches: range,
    lengths: range,
    shape: tuple[int, int | None] | None,
    left_out: set[str],
) -> None:
    bundle = Bundle.load(embedding_bundle)
    stored = load_reference(embedding_bundle / "reference" / "ratio-4.safetensors")

    class Narrow:
        def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
            batch, length = inputs["input_ids"].shape
            assert batch in batches
            assert length in lengths
            assert inputs["attention_mask"].any(axis=-1).all()
            return session.run(inputs)

    session = bundle.session(variant=4)
    real_text = next(expected for expected in stored if expected.case.name == REAL_TEXT)
    found, left = check_invariances(
        "x",
        Narrow(),
        real_text,
        ratio=4,
        pad_token_id=bundle.manifest.backbone.pad_token_id,
        token_outputs=bundle.manifest.backbone.token_outputs,
        max_length=64,
        supports_shape=lambda batch, length: batch in batches and length in lengths,
    )
    assert all(finding.passed for finding in found)
    assert left.keys() == left_out
    shapes = {finding.question.input_shape for finding in found}
    if shape is not None:
        ((batch, length),) = shapes
        assert shape in ((batch, length), (batch, None))
    elif left_out:
        assert not found
    else:
        assert shapes == {real_text.case.shape}
    assert {f.question.check for f in found} >= {*CHECKS} - left_out


@pytest.mark.parametrize("name", [*FAULTS, WRONG_RATIO])
def test_a_planted_fault_is_caught_and_found(
    faulty: Path, masked_bundle: Path, tmp_path: Path, name: str
) -> None:
    if "excludes" in name:
        faulty = tmp_path / "masked"
        shutil.copytree(masked_bundle, faulty)
    if name == WRONG_RATIO:
        shutil.copyfile(faulty / "ratio-2.onnx", faulty / "ratio-4.onnx")
    else:
        plant(FAULTS[name], faulty / "ratio-4.onnx")
    sign(faulty)
    checks, module = _published()[name]
    stored = verify(faulty, [4], reference="stored")
    folder = tmp_path / "reproduction"
    result = verify(faulty, [4], reference="eager", profile_shapes="none", reproduction=folder)
    for verification in (stored, result):
        assert {finding.question.graph for finding in verification.failures} == {"ratio-4.onnx"}
        assert _failed_checks(verification) == checks
        json.dumps(verification.as_dict(), allow_nan=False)
    if module == "it does not run":
        assert not result.bisections
        assert "Got invalid dimensions" in (result.failures[0].problem or "")
        return
    (bisection,) = result.bisections
    if bisection.first is None:
        assert module == "none: behind the last"
        assert not folder.exists()
        return
    assert bisection.first.module == module.strip("`")
    script = [sys.executable, "reproduce.py"]
    where = folder / "ratio-4" / "ratio-4.onnx"
    shown = subprocess.run(script, cwd=where, capture_output=True, text=True, check=False)
    if name == WRONG_RATIO:
        assert "the graph returns the shape (1, 2, 32), eager PyTorch (1, 1, 32)" in shown.stderr
        return
    error, limit = (float(number) for number in re.findall(r"(?:error|allowed:) (\S+)", shown.stdout))
    assert error > 100 * limit


def test_changed_weights_are_caught_in_every_graph(faulty: Path) -> None:
    weight = "encoder.layer.0.intermediate.dense.weight"
    _change_weight(faulty, weight, lambda array: array * np.float32(1.01))
    sign(faulty)
    result = verify(faulty, reference="stored", profile_shapes="none")
    graphs = {finding.question.graph for finding in result.failures}
    assert graphs == {"ratio-1.onnx", "ratio-2.onnx", "ratio-4.onnx", "any-ratio.onnx"}
    with pytest.raises(NumbersDisagreeError, match=f"{re.escape(weight)} in weights"):
        verify(faulty, reference="eager")


def _change_weight(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "weights.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "weights.safetensors")


def _without_unused_tokens(folder: Path) -> None:
    """Zero the embeddings that no case reads."""
    stored = load_reference(folder / "reference" / "ratio-1.safetensors")
    used = np.unique(np.concatenate([expected.case.inputs["input_ids"].ravel() for expected in stored]))

    def change(array: np.ndarray) -> np.ndarray:
        changed = np.zeros_like(array)
        changed[used] = array[used]
        return changed

    _change_weight(folder, "embeddings.word_embeddings.weight", change)


def _edit(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return edit


def _other_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["ferry"], vocabulary["boat"] = vocabulary["boat"], vocabulary["ferry"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _noisy_plugin(folder: Path) -> None:
    path = folder / "plugins" / "ratio-4"
    plugin = load_plugin(path)
    noise = np.random.default_rng(0)
    tensors = {name: noise.normal(size=t.shape).astype(t.dtype) for name, t in plugin.tensors.items()}
    save_plugin(dataclasses.replace(plugin, tensors=tensors), path)


def _manifest(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / MANIFEST_NAME).read_text())
        edit(content)
        (folder / MANIFEST_NAME).write_text(json.dumps(content))

    return change


# What no case of the numerical checks reads. Those that only the steps tell are in docs/verification.md.
CONTENT: dict[str, tuple[Callable[[Path], None], bool]] = {
    "embeddings of tokens that no case reads": (_without_unused_tokens, True),
    "lower-casing switched off": (_edit("tokenizer.json", normalizer=None), True),
    "two words of the vocabulary swapped": (_other_vocabulary, True),
    "no special tokens": (_edit("tokenizer.json", post_processor=None), True),
    "another pooling for other programs": (_edit("1_Pooling/config.json", pooling_mode_cls_token=True), True),
    "another activation in config.json": (_edit("config.json", hidden_act="relu"), True),
    "other labels in config.json": (_edit("config.json", id2label={"0": "b", "1": "a"}), True),
    "another longest text": (_manifest(lambda m: m["backbone"].update(max_length=63)), True),
    "another task": (_manifest(lambda m: m["backbone"].update(task="fill-mask")), True),
    "another pad token": (_manifest(lambda m: m["backbone"].update(pad_token_id=7)), False),
    "another precision": (_manifest(lambda m: m.update(precision="float16")), False),
    "a variant less": (_manifest(lambda m: m["variants"].pop(1)), False),
    "a plugin of noise": (_noisy_plugin, False),
    "another hash of the backbone": (
        _manifest(lambda m: m["backbone"].update(weights_sha256="0" * 64)),
        False,
    ),
}


@pytest.mark.parametrize("fault", [f for f in CONTENT if f not in ("another longest text", "another task")])
def test_the_steps_tell_content_that_no_case_reads(faulty: Path, fault: str) -> None:
    """The hashes of the files are right; those that the build recorded are as they were."""
    CONTENT[fault][0](faulty)
    sign(faulty, steps=False)
    for reference in ("stored", "eager"):
        with pytest.raises(NumbersDisagreeError, match="but the build recorded"):
            verify(faulty, [4], reference=reference)  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", [fault for fault, (_, of_backbone) in CONTENT.items() if of_backbone])
def test_the_backbone_tells_content_that_no_case_reads(faulty: Path, fault: str) -> None:
    """All hashes are right."""
    CONTENT[fault][0](faulty)
    sign(faulty)
    with pytest.raises(NumbersDisagreeError, match=r"is not the backbone's"):
        verify(faulty, [4], reference="eager", profile_shapes="none")


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        (lambda name: "outputs/sentence_embedding" in name, "has the outputs last_hidden_state"),
        (lambda name: name.startswith(REAL_TEXT), "it lacks the case 'real text'"),
        (lambda name: "base_error" in name, "is not a stored reference"),
    ],
)
def test_a_reference_that_lacks_something_is_refused(
    faulty: Path, drop: Callable[[str], bool], words: str
) -> None:
    from safetensors.numpy import load_file, save_file

    path = faulty / "reference" / "ratio-4.safetensors"
    save_file({name: array for name, array in load_file(path).items() if not drop(name)}, path)
    sign(faulty)
    with pytest.raises(UserError, match=words):
        verify(faulty, [4], reference="stored")


def _published() -> dict[str, tuple[set[str], str]]:
    """The table in the docs: what catches which fault, and the module that is named."""
    page = PAGE.read_text(encoding="utf-8").split("## Faults that the checks catch")[1]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    return {fault: (set(checks.split("; ")), module) for fault, checks, module in rows}


def test_every_fault_of_the_page_is_planted() -> None:
    assert _published().keys() - {"fault"} == {*FAULTS, WRONG_RATIO}


def test_every_module_of_a_correct_graph_is_within_its_budget(embedding_bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.load(embedding_bundle)
    eager = EagerBundle(opened, None, ())
    for variant in opened.manifest.variants:
        right = verify(embedding_bundle, [variant.name], reference="stored").findings[variant.name]

        def bisections(of_outputs: bool) -> list[Bisection]:
            wrong = [
                dataclasses.replace(f, problem="x") if (f.question.check == REFERENCE) == of_outputs else f
                for f in right  # noqa: B023
            ]
            found = eager.bisect(variant, wrong, Graphs(opened), tmp_path, Progress())  # noqa: B023
            assert [b.graph for b in found] == [f"{variant.name}.onnx", "any-ratio.onnx"]  # noqa: B023
            assert [b.first for b in found] == [None, None]
            assert all(len(b.modules) == b.num_modules > 30 for b in found)
            return found

        for bisection in bisections(of_outputs=False):
            assert "only the independence of the rows fails" in str(bisection)
        for bisection in bisections(of_outputs=True):
            assert "opened again, it is right: the fault is in this file" in str(bisection)


LAYER = "encoder.layer.1"


class FusesWrongly(Graphs):
    """Where a layer is one piece, its outputs are wrong: as a runtime's fault in what it fuses would be.

    Where it is not, they are right. Besides, the runtime may refuse a graph with so many outputs; and one
    module may be a little off.
    """

    prefix = f"{LAYER}."
    refuses_from = 1000
    off = ""

    def bisect_target(self, variant: Variant, file: str, progress: Progress, /) -> BisectSubject:
        target = super().bisect_target(variant, file, progress)
        values = module_outputs(target.load())
        inside = {value for module, value in values.items() if module.startswith(self.prefix)}
        inside -= {values[LAYER], *(value.name for value in target.load().graph.outputs)}

        def open_(model: ir.Model, inputs: Mapping[str, np.ndarray]) -> Callable[[], Arrays]:
            outputs = {value.name for value in model.graph.outputs}
            if len(outputs) >= self.refuses_from:
                raise UserError("No engine was built. In its own words:\n  no tactic", "Try another one.")
            if not outputs & inside:
                weight = model.graph.initializers[f"{LAYER}.output.dense.bias"]
                assert weight.const_value is not None
                weight.const_value = ir.tensor(weight.const_value.numpy() + 1.0, name=weight.name)
            run = target.open(model, inputs)

            def run_off() -> Arrays:
                return {n: a * 1.00001 if n == values.get(self.off) else a for n, a in run().items()}

            return run_off

        return dataclasses.replace(target, open=open_)


@pytest.fixture
def bisect_wrongly(embedding_bundle: Path, tmp_path: Path) -> Callable[[], Bisection]:
    """Bisect a graph that is said to have failed, on `FusesWrongly`."""
    opened = Bundle.load(embedding_bundle)
    right = verify(embedding_bundle, [4], reference="stored").findings["ratio-4"]
    wrong = [
        dataclasses.replace(f, problem="x")
        for f in right
        if (f.question.check, f.question.graph) == (REFERENCE, "ratio-4.onnx")
    ]

    def bisect() -> Bisection:
        eager = EagerBundle(opened, None, ())
        (found,) = eager.bisect(opened.variant(4), wrong, FusesWrongly(opened), tmp_path, Progress())
        return found

    return bisect


@pytest.mark.parametrize("off", ["", "encoder.layer.0.attention.self.query"])
@pytest.mark.parametrize("refuses_from", [1000, 30])
def test_fewer_modules_are_looked_at_where_more_would_hide_the_fault_or_are_refused(
    bisect_wrongly: Callable[[], Bisection],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuses_from: int,
    off: str,
) -> None:
    monkeypatch.setattr(FusesWrongly, "refuses_from", refuses_from)
    monkeypatch.setattr(FusesWrongly, "off", off)
    found = bisect_wrongly()
    assert found.first is not None
    assert found.first.module == LAYER
    assert found.outputs_failed
    assert 1 < len(found.modules) < found.hidden <= found.num_modules
    assert (found.hidden == found.num_modules) is (refuses_from == 1000)
    assert f"with {found.hidden} the fault goes away" in str(found)
    assert (" modules the runtime refuses the graph (no tactic)." in str(found)) is (refuses_from == 30)
    assert (tmp_path / "ratio-4" / "ratio-4.onnx" / "graph.onnx").is_file()


@pytest.mark.parametrize("off", ["", "encoder.layer.0.attention.self.query"])
def test_a_fault_that_goes_away_with_any_value_is_told_as_that(
    bisect_wrongly: Callable[[], Bisection], monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    monkeypatch.setattr(FusesWrongly, "prefix", "")
    monkeypatch.setattr(FusesWrongly, "off", off)
    found = bisect_wrongly()
    assert found.outputs_failed is False
    if off:
        assert found.first is not None
        assert "though the outputs are within theirs in that run" in str(found)
    else:
        assert {finding.module.count(".") for finding in found.modules} == {0}
        assert "the runtime introduces the fault where it fuses across modules" in str(found)


@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        ("verification.runs.open_changed", UserError("No engine.", "Try."), "bisected: No engine."),
        ("verification.runs.open_changed", KeyError("a bug"), "bisected: Traceback"),
        (
            "verification.bisection.reproduction.write_reproduction",
            OSError(28, "No space left on device"),
            "reproduced in a folder: [Errno 28] No space left on device",
        ),
    ],
    ids=["refusal", "bug", "full disk"],
)
def test_what_was_found_stays_where_bisecting_fails(
    faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception, words: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    notes: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "note", notes.append)
    plant(FAULTS["a transposed window"], faulty / "ratio-4.onnx")
    sign(faulty)
    monkeypatch.setattr(f"variator_export.{where}", fail)
    folder = tmp_path / "reproduction"
    result = verify(faulty, [4], profile_shapes="none", reproduction=folder, progress=progress)
    assert result.failures
    assert bool(result.bisections) is where.endswith("write_reproduction")
    assert [note.startswith(f"ratio-4.onnx could not be {words}") for note in notes] == [True]
    assert str(error).splitlines()[0] in notes[0]


def test_the_command_says_what_failed_and_ends_with_3(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(FAULTS["swapped halves of the decompression matrix"], faulty / "ratio-4.onnx")
    sign(faulty)
    junit, summary = tmp_path / "out" / "junit.xml", tmp_path / "summary.md"
    command = ["verify", str(faulty), "--reference", "stored", "--ratio", "4"]
    command += ["--junit", str(junit), "--summary", str(summary), "--format", "json"]
    code = make_app()(command, standalone_mode=False)
    assert code == NumbersDisagreeError.exit_code
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is False
    assert document["reference"] == STORED
    stored = json.loads((faulty / "reports" / "verification.json").read_text())
    assert {**stored, "bundle": document["bundle"]} == document
    suites = ElementTree.parse(junit).getroot()
    failures = suites.findall(".//failure")
    assert int(suites.get("failures", "0")) == len(failures) > 0
    assert "times the rounding error of eager PyTorch; the limit is 4 times" in (failures[0].text or "")
    assert "checks FAILED" in summary.read_text()
    again = ["verify", str(faulty), "--ratio", "4", "--quick", "--bisect"]
    again += ["--reproduction", str(tmp_path / "fault")]
    assert make_app()(again, standalone_mode=False) == NumbersDisagreeError.exit_code
    shown = capsys.readouterr()
    assert "FAILED: ratio-4.onnx, agrees with eager PyTorch" in shown.err
    module = "encoder.layer.1.intermediate.plugin.decompress"
    assert f"the first module that exceeds its budget is {module}: relative Frobenius error" in shown.err
    assert (
        json.loads((faulty / "reports" / "verification.json").read_text())["bisections"][0]["first"] == module
    )
    with pytest.raises(UserError, match="already holds files"):
        make_app()(again, standalone_mode=False)


def test_it_needs_neither_torch_nor_transformers(embedding_bundle: Path) -> None:
    code = BLOCK + "from variator_export.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "verify", str(embedding_bundle)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert STORED in result.stdout


def test_a_bundle_that_cannot_be_written_is_verified_all_the_same(
    faulty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from variator_export.bundle import reports as module

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(faulty / "reports"))

    monkeypatch.setattr(module, "write_json", full)
    assert make_app()(["verify", str(faulty), "--reference", "stored"], standalone_mode=False) is None
    assert "the verification report is not stored" in capsys.readouterr().err


def test_a_reference_of_another_kind_is_refused(faulty: Path) -> None:
    (faulty / "reference" / "ratio-4.safetensors").write_bytes(b"12345678" * 4)
    sign(faulty)
    with pytest.raises(UserError, match="is not a stored reference"):
        verify(faulty, [4], reference="stored")
    with pytest.raises(UserError, match="does not use a backbone"):
        make_app()(["verify", str(faulty), "--reference", "stored", "--backbone", "x"], standalone_mode=False)


def test_the_weights_of_the_backbone_must_be_those_of_the_bundle(
    embedding_bundle: Path, load_model: Callable[[str], Any]
) -> None:
    other = str(load_model("minilm").info.source.folder)
    with pytest.raises(UserError, match="are not those that the bundle was built from"):
        verify(embedding_bundle, backbone=other)
    with pytest.raises(UserError, match="The backbone was not found") as error:
        verify(embedding_bundle, backbone="nowhere")
    assert "--reference stored" in str(error.value.hint)


def test_a_backbone_is_found_from_any_folder(
    small_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that looks like a repository, typed in a folder that is not the current one any more."""
    (tmp_path / "first" / "my").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(small_model("bert"), tmp_path / "first" / "my" / "bert")
    monkeypatch.chdir(tmp_path / "first")
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "backbone": {"source": "my/bert"},
            "plugins": [{"ratio": 2, "initialise": {}}],
            "speed": None,
        }
    )
    bundle = build(recipe, tmp_path / "bundle").bundle
    assert Bundle.load(bundle).manifest.backbone.source == "my/bert"
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("variator_export.core.hub.pin_revision", None)  # would fail if it were called
    assert verify(bundle, [2], reference="eager", profile_shapes="none").passed
    assert str(tmp_path / "first") not in (bundle / "manifest.json").read_text()
    (tmp_path / "first" / "my").rename(tmp_path / "first" / "yours")
    with pytest.raises(UserError, match=r"was built from the folder .*/first/my/bert, which is not") as error:
        verify(bundle, reference="eager")
    assert "--backbone" in error.value.hint
    moved = str(tmp_path / "first" / "yours" / "bert")
    assert verify(bundle, [2], backbone=moved, profile_shapes="none").passed
    # Without the record, the path holds in the folder where it was typed.
    (bundle / "reports" / "backbone.json").write_text("{")
    (tmp_path / "first" / "yours").rename(tmp_path / "first" / "my")
    with pytest.raises(UserError, match="was built from the folder my/bert"):
        verify(bundle, reference="eager")
    monkeypatch.chdir(tmp_path / "first")
    assert verify(bundle, [2], reference="eager", profile_shapes="none").passed


def test_the_stored_reference_is_what_was_computed(embedding_bundle: Path) -> None:
    stored = load_reference(embedding_bundle / "reference" / "ratio-2.safetensors")
    for expected in stored:
        assert expected.case.inputs["input_ids"].dtype == np.int64
        assert expected.outputs["last_hidden_state"].dtype == np.float32
        for budget in expected.budgets.values():
            assert 0.99 * FLOAT32.epsilon < budget.relative_frobenius < 1e-4


def test_budgets_by_hand() -> None:
    expected = np.array([1.0, -4.0])
    cases = [{"y": deviation(expected + error, expected)} for error in (0.0, 1e-5, 4e-3)]
    exact, usual, rough = (case["y"] for case in make_budgets(cases, "float32"))
    assert exact == usual  # eager was exact by chance: what is usual holds
    assert usual.max_abs == pytest.approx(1e-5 / 4)
    assert rough.max_abs == pytest.approx(4e-3 / 4)  # and does not widen the others
    found = deviation(expected + np.array([0.0, 3e-5]), expected)
    assert usual.used(found) == pytest.approx(3.0)
    assert usual.allows(found)
    assert not usual.allows(found, 2.9)
    silent = make_budgets([{"y": deviation(expected, expected)}], "float16")[0]["y"]
    assert silent == Budget(9.77e-4, 9.77e-4, 9.77e-4)  # a unit of float16


def test_what_is_just_outside_its_limit_is_judged_by_more_roundings() -> None:
    wanted, asked = np.array([1.0, -4.0]), list[int]()
    budgets = {"y": Budget(1e-6, 1e-6, 1e-6)}

    def measure() -> dict[str, Budget]:
        asked.append(1)
        return {"y": Budget(3e-6, 3e-6, 3e-6)}

    def judged(error: float) -> Finding:
        expected = Expected(case, {"y": wanted}, budgets, measure=measure)
        question = Question("x", REFERENCE, case.name, case.shape, "y")
        return judge_carefully(
            expected, "y", lambda budget: judge(question, wanted + np.array([0, error]), wanted, budget)
        )

    case = Case("any", {"input_ids": np.ones((1, 2), np.int64)})
    assert judged(3e-6 * 4).passed
    assert not asked, "within the limit"
    assert judged(1e-5 * 4).passed
    assert len(asked) == 1
    assert Budget(1e-6, 1e-6, 1e-6) == budgets["y"], "the average is judged by the first one"
    assert not judged(2e-5 * 4).passed
    assert len(asked) == 2
    assert not judged(1e-4 * 4).passed
    assert len(asked) == 2, "far outside"


def test_more_roundings_are_stored(tmp_path: Path) -> None:
    """So that a machine without PyTorch does not refuse what the build accepted."""
    inputs = {name: np.ones((1, 2), np.int64) for name in ("input_ids", "attention_mask")}
    case = Case(REAL_TEXT, inputs, stored=True)
    first, more = {"y": Budget(1e-6, 1e-6, 1e-6)}, {"y": Budget(3e-6, 3e-6, 3e-6)}
    for careful in ({}, more):
        save_reference([Expected(case, {"y": np.ones(2)}, first, careful)], tmp_path / "reference")
        (found,) = load_reference(tmp_path / "reference", ["y"])
        assert (found.budgets, found.careful, found.measure) == (first, careful, None)


def test_other_roundings_are_as_large_and_leave_the_weights_alone(
    load_model: Callable[[str], Backbone],
) -> None:
    backbone = load_model("minilm")
    model, exact = EagerModel(backbone, None), EagerModel(backbone.to_dtype(torch.float64), None)
    inputs = {
        "input_ids": np.arange(1000, 1032)[None],
        "attention_mask": np.ones((1, 32), np.int64),
        "token_type_ids": np.zeros((1, 32), np.int64),
    }
    wanted, before = exact.run(inputs)["last_hidden_state"], model.run(inputs)["last_hidden_state"]
    first = np.linalg.norm(before - wanted)
    weights = backbone.model.encoder.layer[0].output.dense.weight.numpy().copy().view(np.int32)
    for seed in range(3):
        with model.rounded_otherwise(seed):
            found = model.run(inputs)["last_hidden_state"]
            changed = backbone.model.encoder.layer[0].output.dense.weight.numpy().view(np.int32)
            steps = changed.astype(np.int64) - weights
            assert set(np.unique(steps)) == {-1, 0, 1}, "one unit"
            assert 0.06 < np.abs(steps).mean() < 0.11
        assert not np.array_equal(found, before)
        assert 0.5 * first < np.linalg.norm(found - wanted) < 2.5 * first
        assert np.array_equal(model.run(inputs)["last_hidden_state"], before)


def test_a_number_near_zero_is_allowed_the_usual_absolute_error() -> None:
    usual = [{"y": deviation(np.array([2.0 + 1e-6]), np.array([2.0]))} for _ in range(4)]
    small = {"y": deviation(np.array([1e-3 + 1e-10]), np.array([1e-3]))}
    *_, budget = (case["y"] for case in make_budgets([*usual, small], "float32"))
    assert budget.relative_frobenius == pytest.approx(1e-6 / 1e-3, rel=0.01)


def test_values_of_different_kinds_do_not_lend_each_other_their_scale() -> None:
    """A module with small outputs keeps its limit beside one with large ones."""
    large = [deviation(np.array([2e3 + 1e-3]), np.array([2e3])) for _ in range(4)]
    small = deviation(np.array([1e-3 + 1e-10]), np.array([1e-3]))
    *_, budget = make_pooled_budgets([*large, small], "float32")
    assert budget.relative_frobenius == pytest.approx(1e-3 / 2e3, rel=0.01)  # the usual share, no more


def test_the_reference_is_finite_where_a_row_is_masked_whole(load_model: Callable[[str], Backbone]) -> None:
    """ModernBERT asks for a softmax in float32, in which the lowest float64 is -inf."""
    backbone = load_model("modernbert").to_dtype(torch.float64)
    mask = (np.arange(60) < 3).astype(np.int64)[None]
    inputs = {"input_ids": np.where(mask, 2000, 0), "attention_mask": mask}
    outputs = EagerModel(backbone, None).run(inputs)
    assert np.isfinite(outputs["last_hidden_state"]).all()
    assert outputs["last_hidden_state"].dtype == np.float64


def test_nan_and_zero_in_deviations() -> None:
    zero, nan = np.zeros(3), np.array([0.0, np.nan, 1.0])
    budget = Budget(1.0, 1.0, 1.0)
    for bad in (nan, np.array([0.0, np.inf, 1.0])):
        for pair in ((bad, zero), (zero, bad)):
            assert not budget.allows(deviation(*pair), 1e300)
            json.dumps(deviation(*pair).as_dict(), allow_nan=False)
    same = deviation(zero, zero)
    assert (same.relative_frobenius, same.cosine, same.scale) == (0.0, 1.0, 1.0)
    assert deviation(np.ones(3), zero).relative_frobenius == pytest.approx(3**0.5)
    assert deviation(np.ones((0, 4)), np.ones((0, 4))).max_abs == 0.0


def test_agreement_by_hand() -> None:
    from scipy.stats import spearmanr

    assert argmax_agreement(np.array([[1, 2], [2, 1]]), np.array([[1, 2], [1, 2]])) == 0.5
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    upper = np.triu_indices(6, 1)
    cosines = [(x @ x.T / np.outer(*[np.linalg.norm(x, axis=1)] * 2))[upper] for x in (a, b)]
    assert rank_correlation(a, b) == pytest.approx(spearmanr(*cosines).statistic)
    assert rank_correlation(a, a * 3) == pytest.approx(1.0)
    assert rank_correlation(np.zeros((4, 2)), np.zeros((4, 2))) == 1.0
    assert rank_correlation(a[:2], b[:2]) is None
    twice = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert rank_correlation(twice, twice) == pytest.approx(1.0)
