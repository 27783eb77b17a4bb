"""What `bench` times beside our own graphs computes the backbone, and its failures are told."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig

from variator_export.benchmark.alternatives.setup import attempt
from variator_export.benchmark.runtimes import ALTERNATIVES, RUNTIMES, Subjects, open_subjects
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.engines.eager import EagerModel
from variator_export.engines.target import SessionOptions
from variator_export.sessions import Bundle
from variator_export.verification.eager_bundle import load_bundle_backbone

# torchao is not installed here: transformers would import it in every test.
HERE = [name for name in ALTERNATIVES if name != "torchao"]
INT8 = ("quantize_dynamic", "openvino-nncf", "torchao", "ctranslate2-int8")


@pytest.fixture(scope="module")
def opener(embedding_bundle: Path) -> Iterator[Subjects]:
    bundle = Bundle.load(embedding_bundle)
    with open_subjects(bundle, lambda: load_bundle_backbone(bundle, None, ""), SessionOptions(1)) as found:
        yield found


@pytest.fixture(scope="module")
def inputs() -> Arrays:
    """Three rows of 13 tokens; the second ends in padding."""
    ids = np.random.default_rng(0).integers(200, 1000, (3, 13))
    mask = np.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@pytest.mark.parametrize("name", HERE)
def test_it_computes_the_backbone(
    opener: Subjects,
    embedding_bundle: Path,
    inputs: Arrays,
    name: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # CTranslate2 4.8 reads it, but transformers 5 writes it no longer. Folders of earlier versions have it.
    monkeypatch.setattr(BertConfig, "position_embedding_type", "absolute", raising=False)
    backbone = load_bundle_backbone(Bundle.load(embedding_bundle), None, "")
    capfd.readouterr()
    found = opener.open_again(name, "ratio-1").runner.run(inputs)
    assert capfd.readouterr() == ("", ""), "other libraries print progress and advice"
    kept = inputs["attention_mask"] > 0
    for output, expected in EagerModel(backbone, None).run(inputs).items():
        one, other = (a[kept] if a.ndim == 3 else a for a in (found[output], expected))
        if name in INT8:
            cosine = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
            assert 0.97 < cosine.mean() < 0.9999999, output
        else:
            assert np.abs(one - other).max() < 1e-4, output
    assert RUNTIMES[name].only_baseline


def test_what_is_not_installed_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, embedding_bundle: Path
) -> None:
    bundle = Bundle.load(embedding_bundle)
    backbone = load_bundle_backbone(bundle, None, "")
    with open_subjects(bundle, lambda: backbone, SessionOptions(1)) as fresh:
        fresh.open_again("torch.onnx", "ratio-1")
        monkeypatch.setattr("variator_export.core.environment.find_spec", lambda _: None)
        for name, extra in (("openvino-nncf", "alternatives"), ("torchao", "torchao")):
            with pytest.raises(UserError, match=f"The runtime {name} needs the Python package") as raised:
                fresh.open_again(name, "ratio-1")
            assert f"{extra}]" in str(raised.value.hint)


def test_what_fails_in_another_library_is_one_error(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with attempt("n", "numpy", "NumPy cannot"):
            print("advice")
            raise RuntimeError("no such kernel\nand a long story")

    with pytest.raises(UserError, match="NumPy cannot: no such kernel") as raised:
        fail()
    assert "--runtime" in str(raised.value.hint)
    assert capfd.readouterr().out == ""
    print("heard again")
    assert capfd.readouterr().out == "heard again\n"


def test_ctranslate2_refuses_a_head(bundle_of: Callable[[str], Bundle]) -> None:
    bundle = bundle_of("roberta")
    with (
        open_subjects(bundle, lambda: load_bundle_backbone(bundle, None, ""), SessionOptions(1)) as opener,
        pytest.raises(UserError, match="CTranslate2 has no Roberta"),
    ):
        opener.open_again("ctranslate2", "ratio-1")
