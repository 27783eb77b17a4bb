"""Benchmarking: what times mean, and that what is told is complete. No test looks at a duration."""

import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import BLOCK
from packaging.version import Version

from variator_export.benchmark import bundle_benchmark as module
from variator_export.benchmark import schedule as turns
from variator_export.benchmark.bundle_benchmark import bench
from variator_export.benchmark.profile import profile_rows
from variator_export.benchmark.runtimes import Subjects
from variator_export.benchmark.schedule import TimingSettings
from variator_export.benchmark.speed_table import Macs, Subject, break_even, speed_rows
from variator_export.benchmark.timing import Timings
from variator_export.bundle.manifest import Variant
from variator_export.cli.app import make_app
from variator_export.core.errors import TooSlowError, UsageError, UserError
from variator_export.core.progress import Progress
from variator_export.engines.base import Arrays
from variator_export.engines.eager import EagerModel
from variator_export.engines.onnxruntime.alternatives import optimize_transformer
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner, OperatorTime
from variator_export.graph.torch_baseline import export_plain
from variator_export.model.backbone import Backbone
from variator_export.sessions import Bundle
from variator_export.verification.eager_bundle import load_bundle_backbone

QUICK = ["--openings=1", "--block-seconds=0.001", "--window=2", "--max-rounds=4", "--shape=2x16"]

ONCE = TimingSettings(openings=1, block_seconds=0.001, window=2, max_rounds=4, tolerance=1e9)


class _Nothing:
    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        del inputs
        return {}


def _subject(runtime: str, group: str, ratio: int) -> Subject:
    return Subject(runtime, group, ratio, f"ratio-{ratio}", _Nothing(), baseline=ratio == 1)


def _steady(milliseconds: float) -> Timings:
    return Timings((((milliseconds,) * 3,) * 4,))


def test_a_speedup_is_over_the_fastest_baseline_of_its_group() -> None:
    subjects = [
        _subject("eager", "torch", 1),
        _subject("torch.compile", "torch", 1),
        _subject("onnxruntime", "onnxruntime", 1),
        _subject("onnxruntime-optimizer", "onnxruntime", 1),
        _subject("onnxruntime", "onnxruntime", 4),
    ]
    times = (40.0, 30.0, 24.0, 20.0, 10.0)
    timings = {s.key: _steady(t) for s, t in zip(subjects, times, strict=True)}
    macs = {s.key: Macs(400 if s.ratio == 4 else 1000, None) for s in subjects}
    rows = {(row["runtime"], row["ratio"]): row for row in speed_rows(subjects, timings, macs, 1000)}
    compressed = rows["onnxruntime", 4]
    assert compressed["baseline"] == "onnxruntime-optimizer"
    assert (compressed["speedup"], compressed["speedup_low"], compressed["speedup_high"]) == (2.0, 2.0, 2.0)
    assert compressed["speedup_allowed"] == 2.5
    assert compressed["share_of_allowed"] == 0.8
    assert compressed["speedup_over_eager"] == 4.0
    assert compressed["tokens_per_second"] == 100_000
    assert compressed["runs"] == 12
    assert rows["onnxruntime", 1]["speedup"] == pytest.approx(0.8333, abs=1e-4)
    assert rows["eager", 1]["baseline"] == "torch.compile"


def test_tails_are_of_all_runs_and_medians_of_blocks() -> None:
    subject = _subject("onnxruntime", "onnxruntime", 1)
    noisy = Timings((((1.0,) * 9 + (100.0,), (1.0,) * 9 + (100.0,), (1.0,) * 10),))
    (row,) = speed_rows([subject], {subject.key: noisy}, {subject.key: Macs(1, 1)}, 10)
    assert row["median_ms"] == row["p50_ms"] == 1.0
    assert row["p99_ms"] == 100.0
    assert row["speedup_over_eager"] is None


def _row(ratio: int, low: float) -> dict[str, Any]:
    return {"runtime": "r", "variant": f"ratio-{ratio}", "is_baseline": ratio == 1, "speedup_low": low}


def test_a_ratio_pays_from_where_it_pays_ever_after() -> None:
    lows = {(8, 128): 1.5, (1, 8): 1.2, (1, 32): 0.9, (1, 128): 1.1}
    shapes = [(shape, [_row(1, 1.0), _row(4, low), _row(8, 0.5)]) for shape, low in lows.items()]
    assert break_even(shapes) == [
        {"runtime": "r", "variant": "ratio-4", "pays_from": [1, 128]},
        {"runtime": "r", "variant": "ratio-8", "pays_from": None},
    ]


def test_a_bundle_is_timed_on_every_runtime(embedding_bundle: Path) -> None:
    settings = replace(ONCE, threads=1)
    exported = ("torch.onnx", "onnxruntime-optimizer", "quantize_dynamic")
    runtimes = ("eager", "onnxruntime", "any-ratio", *exported, "openvino")
    result = bench(embedding_bundle, [(2, 16), (1, 8)], [4], runtimes=runtimes, settings=settings)
    assert [(s.batch_size, s.sequence_length, s.settled) for s in result.shapes] == [
        (2, 16, True), (1, 8, True)
    ]  # fmt: skip
    keys = [(row["runtime"], row["variant"]) for row in result.shapes[0].rows]
    assert keys == [
        ("eager", "ratio-1"), ("eager", "ratio-4"), ("onnxruntime", "ratio-1"), ("onnxruntime", "ratio-4"),
        ("any-ratio", "ratio-1"), ("any-ratio", "ratio-4"), ("torch.onnx", "ratio-1"),
        ("onnxruntime-optimizer", "ratio-1"), ("quantize_dynamic", "ratio-1"), ("openvino", "ratio-1"),
        ("openvino", "ratio-4"),
    ]  # fmt: skip
    for row in result.shapes[0].rows:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert (row["graph_macs"] is None) == (row["runtime"] in ("eager", "any-ratio", *exported))
        over_eager = [row[f"speedup_over_eager{end}"] for end in ("_low", "", "_high")]
        assert 0 < over_eager[0] <= over_eager[1] <= over_eager[2]
    json.dumps(result.as_dict(), allow_nan=False)
    assert result.torch_threads == 1
    assert result.conditions.keys() == {"before", "after"}
    assert result.versions["openvino"]


def test_all_but_pytorch_is_opened_anew_in_another_order(
    embedding_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    turns_of: list[list[str]] = []
    sessions: list[weakref.ref[Any]] = []
    real_open, real_time = Subjects.open, turns.time_in_turns

    def note_opening(self: Subjects, runtime: str, variant: Variant) -> Subject:
        subject = real_open(self, runtime, variant)
        opened.append(subject.key)
        if runtime == "onnxruntime":
            sessions.append(weakref.ref(subject.runner))
        return subject

    def note_turns(calls: Mapping[str, Any], **settings: Any) -> Any:
        turns_of.append(list(calls))
        alive = [session for session in sessions if session() is not None]
        assert len(alive) == 3, "those of before are closed"
        timings, settled = real_time(calls, **settings)
        return timings, settled and len(turns_of) != 3

    monkeypatch.setattr(Subjects, "open", note_opening)
    monkeypatch.setattr(turns, "time_in_turns", note_turns)
    result = bench(
        embedding_bundle,
        [(1, 8), (2, 8)],
        runtimes=["eager", "onnxruntime"],
        settings=replace(ONCE, openings=3),
    )
    eager, graphs = ([f"{name}/ratio-{k}" for k in (1, 2, 4)] for name in ("eager", "onnxruntime"))
    assert opened[:6] == eager + graphs
    assert [sorted(opened[i : i + 3]) for i in (6, 9)] == [graphs] * 2
    assert len(opened) == 12
    assert turns_of[0] == turns_of[1] == eager + graphs
    assert turns_of[2] != turns_of[0]
    assert turns_of[4] not in (turns_of[0], turns_of[2])
    assert all(sorted(order) == eager + graphs for order in turns_of)
    for shape in result.shapes:
        assert [f"{row['runtime']}/{row['variant']}" for row in shape.rows] == eager + graphs
        assert all(len(row["speedup_of_openings"]) == 3 for row in shape.rows)
        assert all(row["runs"] >= 3 * 4 * 2 for row in shape.rows)
    assert [shape.settled for shape in result.shapes] == [False, True], "one opening did not"


def test_what_others_make_of_the_backbone_is_no_graph_of_ours_and_right(
    embedding_bundle: Path, tmp_path: Path
) -> None:
    backbone = load_bundle_backbone(Bundle.load(embedding_bundle), None, "x")
    ids = np.random.default_rng(0).integers(200, 1000, (3, 13))
    mask = np.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    expected = EagerModel(backbone, None).run(inputs)
    plain = export_plain(backbone, tmp_path / "plain.onnx")
    optimized = optimize_transformer(
        plain, tmp_path / "optimized.onnx", model_type="bert", num_heads=4, hidden_size=32
    )
    for graph in (plain, optimized):
        found = OnnxRuntimeRunner(graph, as_it_comes=True).run(inputs)
        assert found.keys() == expected.keys()
        assert (np.abs(found["last_hidden_state"] - expected["last_hidden_state"])[mask > 0] < 1e-5).all()
    # Earlier optimizers leave the attention of this export as it is.
    if Version(onnxruntime.__version__) >= Version("1.31"):
        fused = [node.op_type for node in onnx.load(optimized).graph.node]
        assert fused.count("Attention") == 2, "as its optimizer does with what it knows"
    assert {node.domain for node in onnx.load(plain).graph.node} == {""}


def test_the_optimizer_fuses_what_it_knows_of_t5(
    load_model: Callable[[str], Backbone], tmp_path: Path
) -> None:
    backbone = load_model("t5-v1.0")
    config = backbone.info.config
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (2, 9))
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = EagerModel(backbone, None).run(inputs)["last_hidden_state"]
    optimized = optimize_transformer(
        export_plain(backbone, tmp_path / "plain.onnx"),
        tmp_path / "optimized.onnx",
        model_type=config.model_type,
        num_heads=config.num_heads,
        hidden_size=config.d_model,
    )
    found = OnnxRuntimeRunner(optimized, as_it_comes=True).run(inputs)["last_hidden_state"]
    assert (np.abs(found - expected)[mask > 0] < 1e-5).all()
    operators = [node.op_type for node in onnx.load(optimized).graph.node]
    assert operators.count("SkipSimplifiedLayerNormalization") == 2 * config.num_layers


def test_what_others_cannot_make_is_left_out_unless_it_was_asked_for(
    embedding_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    notes: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "note", notes.append)
    monkeypatch.setattr("torch.onnx.export", refuse)
    settings = replace(ONCE, threads=1)
    names = ["onnxruntime", "torch.onnx"]
    with pytest.raises(UserError, match=r"torch.onnx .* cannot export the backbone alone: no such operator"):
        bench(embedding_bundle, [(1, 8)], [4], runtimes=names, settings=settings)
    monkeypatch.setattr(module, "available_runtimes", lambda: names)
    result = bench(embedding_bundle, [(1, 8)], [4], settings=settings, progress=progress)
    assert {row["runtime"] for row in result.shapes[0].rows} == {"onnxruntime"}
    assert notes[0].startswith("torch.onnx is left out: torch.onnx ")


def test_an_error_without_words_is_told_too(
    load_model: Callable[[str], Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("torch.onnx.export", refuse)
    with pytest.raises(UserError, match="cannot export the backbone alone: no message"):
        export_plain(load_model("bert"), tmp_path / "plain.onnx")


def test_what_fails_at_its_first_run_is_left_out_unless_it_was_asked_for(
    embedding_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = EagerModel.run

    def run(self: EagerModel, inputs: Mapping[str, np.ndarray]) -> Arrays:
        if self._call is not self._model:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")
        return real(self, inputs)

    notes: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "note", notes.append)
    monkeypatch.setattr(EagerModel, "run", run)
    names = ["eager", "torch.compile", "onnxruntime"]
    words = r"torch.compile fails at 1x8: RuntimeError: InvalidCxxCompiler: No working C\+\+ compiler found"
    with pytest.raises(UserError, match=words):
        bench(embedding_bundle, [(1, 8)], [4], runtimes=names, settings=ONCE)
    monkeypatch.setattr(module, "available_runtimes", lambda: names)
    result = bench(embedding_bundle, [(1, 8), (2, 8)], [4], settings=ONCE, progress=progress)
    assert {row["runtime"] for shape in result.shapes for row in shape.rows} == {"eager", "onnxruntime"}
    assert re.match(f"torch.compile is left out: {words}", notes[0])
    monkeypatch.setattr(EagerModel, "run", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="eager fails at 1x8: ZeroDivisionError: division by zero"):
        bench(embedding_bundle, [(1, 8)], [4], settings=ONCE, progress=progress)


def test_torch_compile_compiles_every_shape() -> None:
    import torch._dynamo

    before = torch._dynamo.config.recompile_limit
    with module.torch_threads(1, 30) as threads:
        assert threads == 1
        assert torch._dynamo.config.recompile_limit == 31
    assert torch._dynamo.config.recompile_limit == before
    with module.torch_threads(None, 3) as threads:
        assert threads == torch.get_num_threads()
        assert torch._dynamo.config.recompile_limit == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fail-under", "nan"], "--fail-under nan is not a speed-up"),
        (["--fail-under", "1.5", "--runtime", "eager", "--runtime", "torch.onnx"], "is not among them"),
        (["--fail-under", "1.5", "--ratio", "1"], "compares ratios above 1, and none is chosen"),
        (["--fail-under", "1.5", "--variant", "ratio-1"], "compares ratios above 1, and none is chosen"),
    ],
)
def test_a_gate_that_compares_nothing_is_refused(
    embedding_bundle: Path, options: list[str], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        make_app()(["bench", str(embedding_bundle), *QUICK, *options], standalone_mode=False)


def test_a_profile_groups_operators_by_module(
    embedding_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "bench",
        str(embedding_bundle),
        *QUICK,
        "--runtime",
        "onnxruntime",
        "--ratio",
        "4",
        "--profile",
    ]
    make_app()([*command, "--format", "json"], standalone_mode=False)
    (shape,) = json.loads(capsys.readouterr().out)["shapes"]
    assert shape["profiles"].keys() == {"ratio-1", "ratio-4"}
    modules = {row["module"]: row for row in shape["profiles"]["ratio-4"]}
    assert "encoder.layer.*.intermediate.plugin.compress" in modules
    assert "Attention" in modules["encoder.layer.*.attention.self"]["operators"]
    assert sum(row["share"] for row in modules.values()) == pytest.approx(1, abs=1e-2)
    assert not any(module.startswith("encoder.layer.0") for module in modules)
    make_app()(command, standalone_mode=False)
    assert "Where ratio-4 spends its time on onnxruntime at 2 x 16" in capsys.readouterr().out


def test_profile_rows_by_hand() -> None:
    times = [
        OperatorTime("a", "MatMul", 2.0),
        OperatorTime("b", "MatMul", 1.0),
        OperatorTime("c", "Add", 3.0),
        OperatorTime("new", "BiasGelu", 1.5),
        OperatorTime("pad", "Pad", 0.5),
    ]
    modules = {"a": "layer.0.dense", "b": "layer.11.dense", "c": "layer.0.dense", "pad": ""}
    assert profile_rows(times, modules) == [
        {
            **{"module": "layer.*.dense", "milliseconds": 6.0, "share": 0.75, "layers": 2},
            "operators": {"MatMul": 3, "Add": 3},
        },
        {
            **{"module": "fused", "milliseconds": 1.5, "share": 0.1875, "layers": None},
            "operators": {"BiasGelu": 1.5},
        },
        {
            **{"module": "outside of modules", "milliseconds": 0.5, "share": 0.0625, "layers": None},
            "operators": {"Pad": 0.5},
        },
    ]


def test_what_is_not_settled_is_said(
    embedding_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = turns.time_in_turns
    monkeypatch.setattr(turns, "time_in_turns", lambda *a, **k: (real(*a, **k)[0], False))
    make_app()(["bench", str(embedding_bundle), *QUICK, "--runtime", "onnxruntime"], standalone_mode=False)
    shown = capsys.readouterr()
    assert "2 x 16 tokens (only 0 openings settled)" in shown.out
    assert "warning: not every opening settled" in shown.err
    assert "note: one opening: the intervals leave out" in shown.err


def test_the_gate_compares_the_lower_bound(
    embedding_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["bench", str(embedding_bundle), *QUICK, "--runtime", "onnxruntime", "--ratio", "4"]
    output = tmp_path / "out" / "bench.json"
    make_app()([*command, "--format", "json", "--output", str(output)], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == document
    stored = json.loads((embedding_bundle / "reports" / "benchmark.json").read_text())
    assert {**stored, "bundle": document["bundle"]} == document
    assert "bundle" not in stored  # a path of this machine

    def timed(rows: Any, *_: Any) -> list[dict[str, Any]]:
        low = {"speedup": 1.8, "speedup_low": 1.6}
        return [{**row, **(low if row["ratio"] > 1 else {})} for row in real(rows, *_)]

    real = module.speed_rows
    monkeypatch.setattr(module, "speed_rows", timed)
    assert make_app()([*command, "--fail-under", "1.6"], standalone_mode=False) is None
    assert make_app()([*command, "--fail-under", "1.7"], standalone_mode=False) == TooSlowError.exit_code == 4
    assert "TOO SLOW (under 1.7): ratio-4 on onnxruntime at 2x16: speed-up 1.80" in capsys.readouterr().err


def test_quality_stands_beside_speed(embedding_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = Bundle.load(embedding_bundle).variant_hashes()
    row: dict[str, Any] = {"variant": "ratio-4", "relative_loss": 0.031, "loss_interval": None}
    row |= {"metrics": {"spearman": 0.75, "recall_at_10": 0.25}, "interval": [0.7, 0.8]}
    report = {
        "task": "similarity",
        "metric": "spearman",
        "warnings": [],
        "data": {"name": "sts"},
        "rows": [row],
        "graphs": variants,
    }
    path = embedding_bundle / "reports" / "quality.json"
    kept = path.read_bytes() if path.exists() else None
    try:
        path.write_text(json.dumps({"a": report, "b": {**report, "graphs": {"ratio-4": "other"}}}))
        make_app()(
            ["bench", str(embedding_bundle), *QUICK, "--runtime", "onnxruntime"], standalone_mode=False
        )
        shown = capsys.readouterr().out
        assert "3.10%" in shown
        assert "75.00%" in shown, "neighbours lost"
        path.write_text("{")
        make_app()(
            ["bench", str(embedding_bundle), *QUICK, "--runtime", "onnxruntime"], standalone_mode=False
        )
        assert "3.10%" not in capsys.readouterr().out
    finally:
        path.unlink() if kept is None else path.write_bytes(kept)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["--shape", "8"], UsageError, "--shape '8' is not a shape"),
        (["--shape", "0x8"], UsageError, "is not a shape"),
        (["--shape", "1x4096"], UserError, "is over the model's limit of 64 tokens"),
        (["--runtime", "onnx"], UsageError, "--runtime 'onnx' is not one of"),
        (["--ratio", "9"], UserError, "has no variant 9"),
        (["--tolerance", "0"], UsageError, "--tolerance 0 is not above 0"),
    ],
)
def test_wrong_options_are_refused(
    embedding_bundle: Path, options: list[str], error: type[UserError], words: str
) -> None:
    with pytest.raises(error) as raised:
        make_app()(["bench", str(embedding_bundle), *options], standalone_mode=False)
    assert words in raised.value.message


def test_it_needs_no_torch(embedding_bundle: Path) -> None:
    code = BLOCK + "from variator_export.cli.main import main; main()"
    command = [sys.executable, "-c", code, "bench", str(embedding_bundle), *QUICK, "--format", "json"]
    result = subprocess.run(
        [*command, "--runtime", "onnxruntime"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["shapes"][0]["rows"]
    assert [row["graph_macs"] for row in rows] == [None] * 3  # what counts them is not there


def test_shapes_are_cut_to_the_limit(embedding_bundle: Path) -> None:
    from variator_export.bundle.manifest import read_manifest
    from variator_export.cli.benchmarking.command import default_shapes

    assert default_shapes(read_manifest(embedding_bundle).backbone) == [(1, 32), (1, 64), (8, 64), (32, 64)]
