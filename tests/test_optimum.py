"""check_optimum.py, as far as it needs no Optimum: it passes right numbers and refuses wrong ones."""

from pathlib import Path

import check_optimum
import numpy as np
import pytest
from optimum_findings import EVERY_CASE, WAYS, judge_variant, table
from safetensors.numpy import load_file, save_file

from variator_export import Bundle
from variator_export.verification.reference import load_reference


@pytest.fixture
def opened(small_bundle: Path, tmp_path: Path) -> Path:
    """What the other environment would write for ratio 4 if it ran the graph as we do."""
    bundle = Bundle.load(small_bundle)
    session = bundle.session(variant=4)
    tensors = {}
    for expected in load_reference(bundle.file("reference/ratio-4.safetensors")):
        name, inputs = expected.case.name, expected.case.inputs
        for way in EVERY_CASE if name != "real text" else WAYS:
            case = name if way != "pipeline" else "call 0"
            tensors |= {f"{way}/{case}/inputs/{key}": array for key, array in inputs.items()}
            tensors |= {f"{way}/{case}/outputs/{key}": array for key, array in session.run(inputs).items()}
    save_file(tensors, tmp_path / "ratio-4.safetensors")
    return tmp_path / "ratio-4.safetensors"


def _problems(bundle: Path, opened: Path, failed: dict[str, str] | None = None) -> list[str]:
    variant = Bundle.load(bundle).variant(4)
    return judge_variant(Bundle.load(bundle), variant, opened, {}, failed or {})["problems"]


def test_right_numbers_pass(small_bundle: Path, opened: Path) -> None:
    bundle = Bundle.load(small_bundle)
    result = judge_variant(bundle, bundle.variant(4), opened, {}, {"saved": "misses a file"})
    assert result["problems"] == []
    assert result["ways"]["default"]["max_abs_to_session"] == 0
    (row,) = table(
        [{"name": "small", "task": "feature-extraction", "class": "ORTModel", "variants": [result]}]
    )
    assert (row["ratio"], row["max_abs_to_session"], row["models"]) == (4, 0, ["small"])
    assert 0 < row["max_abs_to_eager"] < 1e-4


@pytest.mark.parametrize("way", ["default", "io_binding", "pipeline", "saved_with_plugins"])
def test_one_wrong_number_is_named(small_bundle: Path, opened: Path, way: str) -> None:
    tensors = load_file(opened)
    name = next(name for name in tensors if name.startswith(f"{way}/") and "/outputs/" in name)
    tensors[name].flat[0] += 1e-3
    save_file(tensors, opened)
    problems = _problems(small_bundle, opened)
    case = name.split("/")[1]
    assert any(p.startswith(f"{way}, {case}, last_hidden_state, against our session: ") for p in problems)
    assert all("times the rounding of eager, 4 are allowed" in p for p in problems)


def test_other_faults_are_named(small_bundle: Path, opened: Path) -> None:
    tensors = load_file(opened)
    tensors["default/3x37/outputs/last_hidden_state"] = np.zeros((3, 40, 32), np.float32)
    tensors["io_binding/3x37/outputs/last_hidden_state"][0, 0, 0] = np.nan
    tensors["tokenizer/real text/inputs/input_ids"][0, 0] += 1
    save_file(
        {
            name: array
            for name, array in tensors.items()
            if not name.startswith(("numpy/1x1/", "saved_with_plugins/"))
        },
        opened,
    )
    problems = "\n".join(_problems(small_bundle, opened, {"pipeline": "ValueError: no"}))
    for words in (
        "default, 3x37, last_hidden_state, against our session: the shape is (3, 40, 32), not (3, 37, 32)",
        "io_binding, 3x37, last_hidden_state, against eager PyTorch: NaN",
        "tokenizer, real text: the inputs are not those",
        "numpy, 1x1: it was not run",
        "saved_with_plugins: nothing was run",
        "pipeline: ValueError: no",
    ):
        assert words in problems


def test_what_is_printed_is_a_problem(small_bundle: Path, opened: Path) -> None:
    bundle = Bundle.load(small_bundle)
    result = judge_variant(bundle, bundle.variant(4), opened, {"default": ["Could not find"]}, {})
    assert result["problems"] == ["default: it printed: Could not find"]


def test_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_optimum.report({"table": [], "tokenizers": [], "problems": []}) == 0
    assert check_optimum.report({"table": [], "tokenizers": [], "problems": ["bert, ratio-4: far"]}) == 1
    assert "FAILED bert, ratio-4: far" in capsys.readouterr().err
