"""The report's page: what it tells is what the bundle holds, and a browser can read it."""

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artefacts import Artefacts
from conftest import BLOCK
from typer.main import get_command

from variator_export.benchmark.stored import stored_benchmark
from variator_export.cli.app import make_app
from variator_export.core.errors import UsageError, UserError
from variator_export.reporting.bundle_report import report
from variator_export.reporting.dominated import Dominated, dominated_variants
from variator_export.reporting.recommendation import Goals, recommend
from variator_export.sessions import Bundle

MEASURED = "small <&> model"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def measured(artefacts: Artefacts, embedding_bundle: Path) -> Path:
    """A bundle that was verified, timed and evaluated, not to be changed."""
    return artefacts.folder("report", lambda folder: _measure(embedding_bundle, folder / MEASURED)) / MEASURED


def _measure(embedding_bundle: Path, bundle: Path) -> None:
    shutil.copytree(embedding_bundle, bundle)
    for path in (bundle / "reports").glob("*.json"):
        path.unlink()
    shutil.rmtree(bundle / "reports" / "benchmarks", ignore_errors=True)
    make_app()(["verify", str(bundle), "--reference", "stored"], standalone_mode=False)
    timed = ["--openings", "2", "--block-seconds", "0.001", "--window", "2", "--max-rounds", "4"]
    timed += ["--profile", "--threads", "1"]
    shapes = ["--shape", "1x8", "--shape", "2x32", "--runtime", "eager", "--runtime", "onnxruntime"]
    make_app()(["bench", str(bundle), *timed, *shapes], standalone_mode=False)
    pairs = str(Path(__file__).parent / "data" / "sentence_pairs.tsv")
    columns = ["--text-column", "first", "--pair-column", "second", "--label-column", "score"]
    make_app()(
        ["evaluate", str(bundle), "--data", pairs, *columns, "--runtime", "onnxruntime"],
        standalone_mode=False,
    )


def page_text(page: str) -> str:
    """What is to be read on a page, in one line."""
    body = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def _report(bundle: Path, name: str) -> Any:
    return json.loads((bundle / "reports" / name).read_text())


def test_the_page_tells_what_was_measured(measured: Path, tmp_path: Path) -> None:
    result = report(measured, tmp_path / "page.html", plots=tmp_path / "plots")
    page = result.page.read_text(encoding="utf-8")
    text = page_text(page)
    assert result.missing == []
    assert "small <&> model" in text
    assert "<&>" not in page  # escaped
    assert "small <&> model verified" in text
    assert "Verification of ratio-1, ratio-2, ratio-4 passed at" in text
    assert re.search(r"any-ratio every given in each call \d+ none ", text)
    for shape in _report(measured, "benchmark.json")["shapes"]:
        for row in shape["rows"]:
            interval = f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"
            assert f"{row['runtime']} {row['variant']} {row['p50_ms']:.2f}" in text
            assert interval in text
    (quality,) = _report(measured, "quality.json").values()
    assert "spearman, sentence_pairs.tsv (30 examples)" in text
    for row in quality["rows"]:
        name, (low, high) = row["variant"], row["interval"]
        lost = f"{row['metrics']['spearman']:.4f} ({low:.4f} to {high:.4f}) {row['relative_loss']:.2%}"
        low, high = row["loss_interval"]
        lost += f" ({low:.2%} to {high:.2%})" if row["ratio"] > 1 else ""
        lost += "".join(f" {row['metrics'][metric]:.4f}" for metric in ("cosine", "recall_at_10"))
        assert f"{name} {lost}" in text
        gained = " ".join(
            f"{found['speedup']:.2f}x"
            for shape in _report(measured, "benchmark.json")["shapes"]
            for found in shape["rows"]
            if (found["runtime"], found["variant"]) == ("onnxruntime", name)
        )
        assert f"{name} {row['ratio']} {lost} {gained} " in text, "one row holds ratio, quality and speed"
    assert "Where ratio-4 spends its time at 2 x 32 tokens" in text
    assert "encoder.layer.*.intermediate" in text
    assert "Intervals are over 2 openings." in text
    names = {path.name for path in result.plots}
    assert names == {
        f"{name}{suffix}"
        for name in ("trade-off", "latency", "speed-up-eager", "speed-up-onnxruntime", "error")
        for suffix in (".png", ".svg")
    }
    assert page.count("<svg") == len(names) / 2
    assert all(path.stat().st_size > 2000 for path in result.plots)


def test_the_page_needs_no_network(measured: Path, tmp_path: Path) -> None:
    page = report(measured, tmp_path / "page.html").page.read_text(encoding="utf-8")
    links = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!#)([^\"')\s>]+)", page)
    assert links == []
    assert "<script" not in page
    assert "@import" not in page


def test_equal_reports_give_equal_pages(measured: Path, tmp_path: Path) -> None:
    first, second = (report(measured, tmp_path / name).page.read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def _edit_reports(bundle: Path, edit: Callable[[Any], Any], *names: str) -> None:
    for name in names:
        for path in (bundle / "reports").glob(name):
            path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def test_what_is_of_other_graphs_does_not_count(measured: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(measured, bundle)
    benchmarks = ("benchmark.json", "benchmarks/*.json")
    _edit_reports(bundle, lambda r: {**r, "graphs": {**r["graphs"], "ratio-4": "other"}}, *benchmarks)
    _edit_reports(
        bundle, lambda r: {**r, "graphs": {**r["graphs"], "ratio-4.onnx": "other"}}, "verification.json"
    )
    _edit_reports(
        bundle,
        lambda r: {k: {**v, "graphs": {**v["graphs"], "ratio-4": "other"}} for k, v in r.items()},
        "quality.json",
    )
    result = report(bundle)
    assert result.page == bundle / "reports" / "report.html"
    assert [command.split()[1] for command in result.missing] == ["verify", "bench", "evaluate"]
    text = page_text(result.page.read_text(encoding="utf-8"))
    assert "verified at the build only" in text
    assert "agrees with eager PyTorch" in text  # the build's own
    # What was measured on the other graphs, which are the same, is still there.
    assert re.search(r"onnxruntime ratio-2 \d", text)
    assert not re.search(r"onnxruntime ratio-4 \d", text)
    (quality,) = _report(bundle, "quality.json").values()
    shown = {
        row["variant"]: f"{row['variant']} {row['metrics']['spearman']:.4f} (" in text
        for row in quality["rows"]
    }
    assert shown == {"ratio-1": True, "ratio-2": True, "ratio-4": False}
    # Of another backbone, nothing is.
    other = {"ratio-1": "other"}
    _edit_reports(bundle, lambda r: {**r, "graphs": {**r["graphs"], **other}}, *benchmarks)
    _edit_reports(bundle, lambda r: {k: {**v, "graphs": other} for k, v in r.items()}, "quality.json")
    text = page_text(report(bundle).page.read_text(encoding="utf-8"))
    assert "Speed" not in text
    assert "spearman" not in text
    for name in ("benchmark.json", "verification.json", "quality.json", "verification/ratio-4.json"):
        (bundle / "reports" / name).write_text("{")
    assert len(report(bundle).missing) == 3


def test_a_short_run_does_not_replace_a_long_one(measured: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(measured, bundle)
    long = _report(bundle, "benchmark.json")
    shape = "{batch_size}x{sequence_length}".format(**long["shapes"][0])
    command = ["bench", str(bundle), "--runtime", "onnxruntime", "--openings", "1", "--block-seconds", "0.01"]
    command += ["--max-rounds", "4", "--shape", shape, "--shape", "1x4", "--ratio", "4"]
    make_app()(command, standalone_mode=False)
    found = stored_benchmark(Bundle.load(bundle))
    assert found is not None
    rows = {
        (s["batch_size"], s["sequence_length"], row["runtime"], row["variant"]): row["median_ms"]
        for s in found["shapes"]
        for row in s["rows"]
    }
    for s in long["shapes"]:
        for row in s["rows"]:
            key = (s["batch_size"], s["sequence_length"], row["runtime"], row["variant"])
            assert rows[key] == row["median_ms"], "the run with more openings counts"
    assert (1, 4, "onnxruntime", "ratio-4") in rows
    assert (1, 4, "onnxruntime", "ratio-2") not in rows
    # The page shows what there is at each shape.
    text = page_text(report(bundle).page.read_text(encoding="utf-8"))
    assert "1 x 4 tokens" in text
    assert "ratio-4 onnxruntime" in text


@pytest.mark.parametrize("broken", [[], {"graphs": 3}, {"shapes": [{}]}, {"settings": []}, {"machine": None}])
def test_runs_of_another_form_are_passed_over(measured: Path, tmp_path: Path, broken: Any) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(measured, bundle)

    def edit(run: Any) -> Any:
        return broken if isinstance(broken, list) else {**run, **broken}

    _edit_reports(bundle, edit, "benchmark.json", "benchmarks/*.json")
    assert stored_benchmark(Bundle.load(bundle)) is None
    assert [command.split()[1] for command in report(bundle).missing] == ["bench"]


def test_a_failed_verification_is_not_hidden(measured: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(measured, bundle)
    path = bundle / "reports" / "verification.json"
    content = json.loads(path.read_text())
    content["passed"] = False
    content["findings"]["ratio-4"][0] |= {"passed": False, "used": None, "problem": "it does not run"}
    path.write_text(json.dumps(content))
    page = report(bundle, plots=tmp_path / "plots").page.read_text(encoding="utf-8")
    text = page_text(page)
    assert "verification FAILED" in text
    assert "1 FAILED" in text
    assert page.count("no number") == 1, "what does not run is no error of 0"
    assert "no number" in (tmp_path / "plots" / "error.svg").read_text(encoding="utf-8")


def test_the_commands_of_the_page_give_its_numbers_again(measured: Path, tmp_path: Path) -> None:
    page = report(measured, tmp_path / "page.html").page.read_text(encoding="utf-8")
    lines = html.unescape(page.split("<pre>")[1].split("</pre>")[0]).splitlines()
    by_name = {command[1]: command for command in (shlex.split(line, comments=True) for line in lines)}
    assert all(command[2] == measured.name for name, command in by_name.items() if name != "build")
    assert by_name["build"][2:] == ["recipe.yaml", "--output", measured.name]
    bench = " ".join(by_name["bench"][3:])
    assert bench == (
        "--shape 1x8 --shape 2x32 --runtime eager --runtime onnxruntime --openings 2 --block-seconds 0.001 "
        "--window 2 --max-rounds 4 --threads 1 --profile"
    )
    evaluate = " ".join(by_name["evaluate"][3:])
    assert evaluate == (
        "--data sentence_pairs.tsv --text-column first --pair-column second --label-column score "
        "--task similarity"
    )
    command_line = get_command(make_app())
    for name, command in by_name.items():
        known = {option for p in command_line.commands[name].params for option in p.opts}  # type: ignore[attr-defined]
        assert {word for word in command if word.startswith("--")} <= known


def test_verified_in_part_is_not_verified(measured: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(measured, bundle)
    make_app()(["verify", str(bundle), "--reference", "stored", "--ratio", "4"], standalone_mode=False)
    result = report(bundle)
    text = page_text(result.page.read_text(encoding="utf-8"))
    assert "verified in part" in text
    assert "Verification of ratio-4 passed" in text
    assert [command.split()[1] for command in result.missing] == ["verify"]


def test_the_command(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    command = ["report", str(measured), "--output", str(page), "--format", "json"]
    make_app()([*command, "--max-loss", "1%", "--metric", "spearman"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["page"], found["plots"], found["missing"]) == (str(page), [], [])
    (recommendation,) = found["recommendations"]
    assert recommendation["goals"]["max_loss"] == pytest.approx(0.01)
    assert {candidate["variant"] for candidate in recommendation["candidates"]} >= {"ratio-1", "ratio-4"}
    assert page.is_file()
    for wrong in (["--shape", "1x8"], ["--max-loss", "200"], ["--max-latency", "0"], ["--metric", "f1"]):
        with pytest.raises(UsageError, match=wrong[0]):
            make_app()([*command, *wrong], standalone_mode=False)
    with pytest.raises(UserError, match=r"There is no folder .*new to write the report to"):
        make_app()(
            ["report", str(measured), "--output", str(tmp_path / "new" / "p.html")], standalone_mode=False
        )
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="There is no bundle"):
        make_app()(["report", str(tmp_path / "nowhere")], standalone_mode=False)


def _quality(lost: dict[str, float], recall: dict[str, float]) -> dict[str, Any]:
    return {
        "metric": "spearman",
        "data": "sts",
        "variants": {
            name: {"lost": lost[name], "metrics": {"spearman": 0.8, "recall_at_10": recall[name]}}
            for name in lost
        },
    }


def _timed(**latencies: float) -> dict[str, Any]:
    rows = [
        {
            "runtime": "onnxruntime",
            "variant": name.replace("_", "-"),
            "median_ms": ms,
            "speedup": 10 / ms,
            "speedup_low": 9.9 / ms,
            "speedup_high": 10.1 / ms,
        }
        for name, ms in latencies.items()
    ]
    return {"shapes": [{"batch_size": 8, "sequence_length": 128, "rows": rows}]}


def test_variants_that_nobody_should_deploy() -> None:
    names = ["ratio-1", "ratio-2", "ratio-4", "ratio-8"]
    lost = {"ratio-1": 0.0, "ratio-2": 0.03, "ratio-4": 0.02, "ratio-8": 0.04}
    recall = {"ratio-1": 1.0, "ratio-2": 0.7, "ratio-4": 0.7, "ratio-8": 0.6}

    def found(recall: dict[str, float], **timed: float) -> list[tuple[str, str]]:
        quality = [_quality(lost, recall)]
        return [(f.variant, f.by) for f in dominated_variants(names, quality, _timed(**timed))]

    assert found(recall, ratio_1=10, ratio_2=8, ratio_4=5, ratio_8=4) == [("ratio-2", "ratio-4")]
    assert found(recall, ratio_1=10, ratio_2=8, ratio_4=11, ratio_8=4) == [("ratio-4", "ratio-1")]
    assert found({**recall, "ratio-2": 0.9}, ratio_1=10, ratio_2=8, ratio_4=5, ratio_8=4) == []
    assert found(recall, ratio_1=10, ratio_2=8) == [], "ratio-4 was not timed"
    assert found(recall, ratio_1=10, ratio_2=5.01, ratio_4=5, ratio_8=4) == [], "within the intervals"
    assert dominated_variants(names, [], _timed(ratio_1=10, ratio_2=11)) == []
    assert dominated_variants(names, [_quality(lost, recall)], None) == []
    assert Dominated("a", "b").text() == (
        "Do not deploy a: b is faster at every shape and loses no more of any metric."
    )


def test_recommendations() -> None:
    names = ["ratio-1", "ratio-2", "ratio-4"]
    quality = _quality(
        {"ratio-1": 0.0, "ratio-2": 0.004, "ratio-4": 0.02}, {"ratio-1": 1.0, "ratio-2": 0.9, "ratio-4": 0.7}
    )
    timed = _timed(ratio_1=10, ratio_2=8, ratio_4=5)

    def best(**goals: Any) -> str | None:
        return recommend(Goals(**goals), names, [quality], timed).variant

    spearman = {"metrics": ("spearman",)}
    assert best(max_loss=0.01, **spearman) == "ratio-2"
    assert best(max_loss=0.05, **spearman) == "ratio-4"
    assert best(max_loss=0.05) == "ratio-1", "neighbours count too"
    assert best(max_loss=0.1 + 1e-9) == "ratio-2"
    assert best(max_latency_ms=9) == "ratio-2", "within the latency, the least loss"
    assert best(max_latency_ms=20) == "ratio-1"
    assert best(max_latency_ms=6, max_loss=0.01) is None
    none = recommend(Goals(max_loss=0.01, max_latency_ms=6), names, [quality], timed).text()
    assert none == (
        "For at most 1 % lost and at most 6 ms (onnxruntime, 8 x 128 tokens): none. ratio-1 takes 10.0 ms; "
        "ratio-2 loses 10.00% (recall_at_10, sts), takes 8.0 ms; ratio-4 loses 30.00% (recall_at_10, sts)."
    )
    unknown = _quality({"ratio-1": 0.0}, {"ratio-1": 1.0})
    assert recommend(Goals(max_loss=0.5), names, [unknown], timed).variant == "ratio-1", "others are unknown"
    assert recommend(Goals(max_loss=0.05, metrics=("spearman",)), names, [quality], None).variant == "ratio-4"
    with pytest.raises(UserError, match="No quality was measured"):
        recommend(Goals(max_loss=0.5), names, [], timed)
    with pytest.raises(UserError, match="was not timed at 1x8, only at 8x128"):
        recommend(Goals(max_latency_ms=5, shape=(1, 8)), names, [quality], timed)
    with pytest.raises(UserError, match="onnxruntime was not timed"):
        recommend(Goals(max_latency_ms=5), names, [quality], None)


def test_warnings_stand_on_the_page(measured: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(measured, bundle)
    _edit_reports(
        bundle,
        lambda r: {k: {**v, "warnings": ["ratio-4 says yes for every text."]} for k, v in r.items()},
        "quality.json",
    )
    _edit_reports(
        bundle,
        lambda r: {**r, "shapes": [{**shape, "settled": False} for shape in r["shapes"]]},
        "benchmarks/*.json",
        "benchmark.json",
    )
    result = report(bundle)
    text = page_text(result.page.read_text(encoding="utf-8"))
    assert "Warning: similarity on sentence_pairs.tsv: ratio-4 says yes for every text." in text
    assert "Warning: The speed did not settle" in text
    assert "Warning: The plugins of ratio-2, ratio-4 were only initialised" in text
    assert len(result.warnings) == 3


def test_a_damaged_bundle_has_no_report(measured: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(measured, bundle)
    with (bundle / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        report(bundle, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_it_needs_neither_torch_nor_transformers(measured: Path, tmp_path: Path) -> None:
    code = BLOCK + "from variator_export.cli.main import main; main()"
    command = [sys.executable, "-c", code, "report", str(measured), "--output", str(tmp_path / "p.html")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; .ci/run installs one")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_reads_it(measured: Path, tmp_path: Path, width: int) -> None:
    page = report(measured, tmp_path / "page.html").page
    # The page has no script; this copy says how it was laid out.
    probe = """<script>
      const texts = [...document.querySelectorAll("figure svg text")].map(t => getComputedStyle(t).fill);
      document.body.dataset.probe = JSON.stringify({
        overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        tables: document.querySelectorAll("table").length,
        plots: [...document.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect().height),
        fills: [...new Set(texts)], text: getComputedStyle(document.body).color,
      });</script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8") + probe, encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probed.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = json.loads(html.unescape(re.findall(r'data-probe="([^"]*)"', dom)[0]))
    assert found["overflow"] == 0  # wide tables scroll on their own
    assert len(found["plots"]) == 5
    assert min(found["plots"]) > 100
    assert found["fills"] == [found["text"]]  # legible on light and on dark
    assert found["tables"] >= 6
    assert "Verification of ratio-1, ratio-2, ratio-4 passed at" in page_text(dom)
