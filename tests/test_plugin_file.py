"""Plugin files: what is written is read again, and whatever is wrong with one is named."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from variator_export.core.errors import UserError
from variator_export.model.plugin import initialise_plugin
from variator_export.model.plugin_file import load_plugin, load_plugin_config, save_plugin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_plugin(initialise_plugin(4, 16, 2, bottleneck_size=6, seed=3), tmp_path / "plugin")
    return tmp_path / "plugin"


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "plugin_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "plugin.safetensors")
    edit(tensors)
    save_file(tensors, folder / "plugin.safetensors")


def test_a_plugin_is_read_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    plugin = load_plugin(folder)
    save_plugin(plugin, tmp_path / "again")
    for name in ("plugin_config.json", "plugin.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_half_precision_is_kept(folder: Path) -> None:
    _edit_tensors(folder, lambda t: t.update({n: a.astype(np.float16) for n, a in t.items()}))
    assert load_plugin(folder).tensors["layers.0.compress.weight"].dtype == np.float16


def _put_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["layers.1.decompress.up.weight"][3, 2] = np.nan


def _put_inf(tensors: dict[str, np.ndarray]) -> None:
    tensors["layers.0.compress.bias"][1] = np.inf


def _put_integers(tensors: dict[str, np.ndarray]) -> None:
    tensors["layers.0.compress.bias"] = tensors["layers.0.compress.bias"].astype(np.int64)


def _put_wrong_shape(tensors: dict[str, np.ndarray]) -> None:
    tensors["layers.0.compress.weight"] = tensors["layers.0.compress.weight"][:, :8]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_put_nan, ["layers.1.decompress.up.weight", "1 values that are NaN or infinite"]),
        (_put_inf, ["layers.0.compress.bias", "NaN or infinite"]),
        (_put_integers, ["layers.0.compress.bias", "I64", "F32 or F16"]),
        (_put_wrong_shape, ["layers.0.compress.weight", "(4, 8)", "(4, 64)"]),
        (lambda t: t.pop("layers.1.compress.bias"), ["lacks layers.1.compress.bias", "missing: 1"]),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), ["also has extra", "unexpected: 1"]),
    ],
)
def test_wrong_tensors_are_named(folder: Path, edit: Callable[..., object], words: list[str]) -> None:
    _edit_tensors(folder, edit)
    with pytest.raises(UserError) as raised:
        load_plugin(folder)
    for word in ["plugin.safetensors", *words]:
        assert word in raised.value.message


@pytest.mark.parametrize("keep_bytes", [0, 4, 100, 2000])
def test_a_truncated_file_is_refused(folder: Path, keep_bytes: int) -> None:
    path = folder / "plugin.safetensors"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_plugin(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratoi": 4}, ["unknown key 'ratoi'", "did you mean 'ratio'?"]),
        ({"ratio": 0}, ["'ratio' is 0", "has to be at least 1"]),
        ({"ratio": "four"}, ["'ratio' is 'four'"]),
        ({"masking": "some"}, ["'masking' is 'some'", "exclude-padding"]),
        ({"format_version": 2}, ["format_version 2", "reads 1"]),
        ({"ratio": 8}, ["shape (4, 64)", "expected (8, 128) for ratio 8"]),
        ({"num_layers": 3}, ["lacks layers.2.", "missing: 6"]),
    ],
)
def test_a_wrong_configuration_is_named(folder: Path, changes: dict[str, object], words: list[str]) -> None:
    _edit_config(folder, **changes)
    with pytest.raises(UserError) as raised:
        load_plugin(folder)
    for word in words:
        assert word in raised.value.message


def test_a_configuration_that_is_no_json(folder: Path) -> None:
    (folder / "plugin_config.json").write_text("{ratio: 4")
    with pytest.raises(UserError, match="not valid JSON"):
        load_plugin_config(folder)


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_plugin(tmp_path / "nowhere")
    (folder / "plugin.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no plugin\.safetensors"):
        load_plugin(folder)
