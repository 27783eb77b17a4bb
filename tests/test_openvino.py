"""OpenVINO as a target: sessions, precisions, threads, verification."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artefacts import Artefacts
from command_line import call

from variator_export.building.recipe_build import build
from variator_export.core.errors import UserError
from variator_export.engines.openvino import runner as module
from variator_export.engines.openvino.runner import OpenVinoRunner, openvino_core
from variator_export.engines.targets import TARGETS
from variator_export.recipe.recipe import Recipe
from variator_export.sessions import Bundle
from variator_export.verification.bundle_verification import store_verification, verify
from variator_export.verification.judging.compare import deviation
from variator_export.verification.verified_graph import open_for_verification

HAS_BFLOAT16 = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="session")
def bfloat16_bundle(artefacts: Artefacts, small_recipe: Recipe) -> Path:
    """The small bundle in bfloat16; not to be changed."""
    recipe = small_recipe.model_copy(update={"precision": "bfloat16"})
    return artefacts.folder("bundles/small-bfloat16", lambda folder: build(recipe, folder))


def rows(bundle: Bundle, seed: int = 0) -> dict[str, np.ndarray]:
    """Three rows of 13 tokens; the second ends in padding."""
    values = {name: np.ones((3, 13), np.int64) for name in bundle.manifest.backbone.inputs}
    values["input_ids"] = np.random.default_rng(seed).integers(1000, 30000, (3, 13))
    values["attention_mask"][1, 6:] = 0
    return values


def test_a_session_runs_every_ratio(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    session, reference, inputs = bundle.session("openvino", threads=1), bundle.session(), rows(bundle)
    assert session.ratios == (1, 2, 3, 4)
    assert session.names == ("ratio-1", "ratio-2", "ratio-3", "ratio-4")
    for ratio in (None, 1, 2, 3, 4, "ratio-4"):
        found = session.run(inputs, ratio)["last_hidden_state"]
        expected = reference.run(inputs, ratio)["last_hidden_state"]
        kept = inputs["attention_mask"] > 0
        assert deviation(found[kept], expected[kept]).relative_frobenius < 1e-5
    with pytest.raises(UserError, match="no variant 7"):
        session.run(inputs, 7)
    with pytest.raises(UserError, match="were given; the model accepts"):
        session.run({"input_ids": inputs["input_ids"]})
    with pytest.raises(UserError, match="A session on OpenVINO accepts no other plugin"):
        session.add_plugin("new", "nowhere")


def test_a_session_of_one_variant(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    session, inputs = bundle.session("openvino", variant=4), rows(bundle)
    assert (session.ratios, session.names) == ((4,), ("ratio-4",))
    assert np.array_equal(*(session.run(inputs, k)["last_hidden_state"] for k in (None, 4)))
    with pytest.raises(UserError, match="This session runs ratio-4, not 1"):
        session.run(inputs, 1)
    with pytest.raises(UserError, match="This session runs ratio-4 alone"):
        session.add_plugin("new", "nowhere")


def test_threads_share_a_session(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    session = bundle.session("openvino", threads=1)
    cases = [rows(bundle, seed) for seed in range(8)]
    expected = [session.run(inputs, 2)["last_hidden_state"] for inputs in cases]
    wrong: list[int] = []

    def work(place: int) -> None:
        for _ in range(20):
            found = session.run(cases[place], 2)["last_hidden_state"]
            if not np.array_equal(found, expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


_INTERRUPTED = """
import os, signal, sys, time
from variator_export import Bundle

signal.signal(signal.SIGINT, signal.default_int_handler)
bundle = Bundle.load(sys.argv[1])
for _ in range(2):
    session = bundle.session("openvino", threads=1)
    del session
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_a_session_is_no_crash(small_bundle: Path) -> None:
    command = [sys.executable, "-c", _INTERRUPTED, str(small_bundle)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "interrupted\n"), result.stderr


def test_what_openvino_returns_is_the_callers(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    session = bundle.session("openvino", variant=1)
    first = session.run(rows(bundle, 0))["last_hidden_state"]
    kept = first.copy()
    session.run(rows(bundle, 1))
    assert np.array_equal(first, kept), "the next call does not write into it"


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU has no products in bfloat16")
def test_bfloat16_computes_in_bfloat16_and_passes_verification(bfloat16_bundle: Path) -> None:
    bundle = Bundle.load(bfloat16_bundle)
    found = bundle.session("openvino", variant=1).run(rows(bundle))["last_hidden_state"]
    widened = open_for_verification(bfloat16_bundle / "ratio-1.onnx", {}, "bfloat16")
    in_float32 = widened.run(rows(bundle))["last_hidden_state"]
    kept = rows(bundle)["attention_mask"] > 0
    assert deviation(found[kept], in_float32[kept]).relative_frobenius > 1e-3, "the products are rounded too"
    result = verify(bfloat16_bundle, [2], target="openvino", profile_shapes="none")
    assert result.passed
    assert result.ran.startswith("on openvino (openvino 20")
    assert {f.question.graph for f in result.findings["ratio-2"]} == {"ratio-2.onnx"}


def test_a_cpu_without_bfloat16(bfloat16_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(bfloat16_bundle)
    monkeypatch.setitem(module._CAPABILITIES, "bfloat16", "NO_SUCH_CAPABILITY")
    with pytest.raises(UserError, match="This CPU has no products in bfloat16"):
        bundle.session("openvino")
    target = TARGETS.find("openvino")
    assert target.runs_graphs(bundle, "2026.4.1, CPU, BF16, FP32")
    assert not target.runs_graphs(bundle, "2026.4.1, CPU, FP32")


def test_verification_on_openvino_is_stored_and_finds_faults(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = verify(bundle_copy, [2], target="openvino", profile_shapes="none")
    assert result.passed
    with pytest.raises(UserError, match="A graph on openvino cannot be bisected"):
        verify(bundle_copy, [2], target="openvino", reproduction=tmp_path / "fault")
    real = OpenVinoRunner.run

    def scaled(self: OpenVinoRunner, inputs: Any) -> Any:
        return {name: array * np.float32(1.001) for name, array in real(self, inputs).items()}

    monkeypatch.setattr(OpenVinoRunner, "run", scaled)
    assert not verify(bundle_copy, [2], target="openvino", profile_shapes="none").passed
    stored = json.loads(store_verification(result).read_text())
    assert stored["target"] == "openvino"
    assert (bundle_copy / "reports" / "verification-openvino.json").exists()


def test_precisions_that_openvino_does_not_run(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(small_bundle)
    for precision in ("int8", "float16"):
        changed = bundle.manifest.model_copy(update={"precision": precision})
        monkeypatch.setattr(bundle, "manifest", changed)
        with pytest.raises(
            UserError, match=f"is in {precision}; OpenVINO runs bundles in float32, bfloat16, int8-static"
        ):
            bundle.session("openvino")


def test_the_command_line(small_bundle: Path, bundle_of: Callable[[str], Bundle]) -> None:
    text = ["--text", "Seven.", "--format", "json"]
    classifier = str(bundle_of("roberta").path)
    one, other = (call("run", classifier, "--target", name, *text) for name in ("openvino", "onnxruntime"))
    assert (one.returncode, other.returncode) == (0, 0), one.stderr
    assert json.loads(one.stdout).keys() == json.loads(other.stdout).keys()
    refused = call("build", "--target", "openvino")
    assert refused.returncode == 1
    assert call("verify", str(small_bundle), "--target", "openvno").returncode == 2
