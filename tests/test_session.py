"""Sessions: every ratio from one session, without torch or transformers."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import BLOCK

from variator_export import Bundle, UserError


def _inputs(bundle: Bundle, *texts: str) -> dict[str, np.ndarray]:
    backbone = bundle.manifest.backbone
    return bundle.text_encoder().encode(texts, backbone.inputs, backbone.max_length)


def test_one_session_changes_its_ratio_from_call_to_call(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    session = bundle.session(target="onnxruntime")
    assert session.ratios == (1, 2, 3, 4)
    inputs = _inputs(bundle, "The ferry leaves at seven.", "Yes.")
    own = {k: bundle.session(variant=k).run(inputs)["last_hidden_state"] for k in session.ratios}
    for ratio in (4, 1, 2, 4, 3, 1, 2):
        found = session.run(inputs, ratio=ratio)["last_hidden_state"]
        np.testing.assert_allclose(found, own[ratio], atol=1e-5)
    assert np.abs(own[4] - own[1]).max() > 1e-3, "the ratios differ, or this shows nothing"


def test_sessions_need_neither_torch_nor_transformers(small_bundle: Path) -> None:
    code = BLOCK + textwrap.dedent(f"""
        from variator_export import Bundle
        bundle = Bundle.load({str(small_bundle)!r})
        session = bundle.session(target="onnxruntime")
        backbone = bundle.manifest.backbone
        inputs = bundle.text_encoder().encode(["Yes."], backbone.inputs, backbone.max_length)
        print([session.run(inputs, ratio=k)["last_hidden_state"].shape for k in session.ratios])
    """)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str([(1, 4, 32)] * 4)


def test_commands_that_use_a_bundle_need_neither_torch_nor_transformers(small_bundle: Path) -> None:
    for command in (
        ["run", str(small_bundle), "--ratio", "2", "--text", "Yes.", "--format", "json"],
        ["inspect", str(small_bundle), "--format", "json"],
    ):
        code = BLOCK + f"sys.argv[1:] = {command!r}\nfrom variator_export.cli.main import main\nmain()"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        json.loads(result.stdout)


def test_what_does_not_fit_is_named(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    session = bundle.session()
    good = _inputs(bundle, "Yes.")
    for inputs, words in (
        ({"input_ids": good["input_ids"]}, "the model takes input_ids, attention_mask, token_type_ids"),
        ({**good, "position_ids": good["input_ids"]}, "position_ids"),
        ({**good, "attention_mask": good["attention_mask"][:, :2]}, "the shapes"),
        ({name: array[:, :0] for name, array in good.items()}, "the shapes"),
        ({name: array.astype(np.float32) for name, array in good.items()}, "the types"),
        ({name: np.zeros((1, 65), np.int64) for name in good}, "have 65 tokens; the model's limit is 64"),
        ({**good, "input_ids": -good["input_ids"]}, "holds negative numbers"),
        ({**good, "input_ids": good["input_ids"] + 10**6}, "ONNX Runtime failed on inputs of the shapes"),
    ):
        with pytest.raises(UserError, match=words):
            session.run(inputs)
    with pytest.raises(UserError, match="has no variant 8"):
        session.run(good, ratio=8)
    with pytest.raises(UserError, match=r"This session runs ratio-2 \(ratio 2\), not 4"):
        bundle.session(variant=2).run(good, ratio=4)
    with pytest.raises(UserError, match="A session on openvino is not available"):
        bundle.session("openvino")


def test_a_session_outlives_the_bundle_it_was_opened_from(bundle_copy: Path) -> None:
    bundle = Bundle.load(bundle_copy)
    session, inputs = bundle.session(), _inputs(bundle, "Yes.")
    bundle_copy.rename(bundle_copy.parent / "gone")
    for ratio in session.ratios:
        assert session.run(inputs, ratio=ratio)["last_hidden_state"].shape == (1, 4, 32)


def test_a_bundle_that_was_published_again_meanwhile_is_not_mixed(bundle_copy: Path) -> None:
    bundle = Bundle.load(bundle_copy)
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["made_by"]["code"] = "another"
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was published again while it was being opened"):
        bundle.session()


def test_32_bit_integers_are_taken(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    narrow = {name: array.astype(np.int32) for name, array in _inputs(bundle, "Yes.").items()}
    assert bundle.session().run(narrow, ratio=2)["last_hidden_state"].dtype == np.float32
