"""What is missing is named with the command that installs it."""

import pytest

from variator_export.core import environment
from variator_export.core.errors import UserError


def _installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(environment, "installed_version", lambda name: "1.0" if name in names else None)


def test_the_two_onnxruntimes_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(UserError, match="overwrite each other's files") as raised:
        environment.require_onnxruntime()
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(raised.value.hint)
    _installed(monkeypatch, "onnxruntime-gpu")
    assert environment.require_onnxruntime() == "onnxruntime-gpu"


def test_a_missing_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch)
    with pytest.raises(UserError, match="no distribution onnxruntime"):
        environment.require_onnxruntime()
    monkeypatch.setattr(environment, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the Python package onnxruntime") as raised:
        environment.require_onnxruntime()
    assert "pip install 'variator-export[onnxruntime]'" in str(raised.value.hint)


def test_missing_packages_to_make_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.require_export()
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match="Exporting graphs needs the Python package onnxscript") as raised:
        environment.require_export()
    assert "pip install 'variator-export[export]'" in str(raised.value.hint)


def test_a_machine_is_described_without_guessing() -> None:
    found = environment.machine()
    assert found["cpu_cores"] >= 1
    assert found["memory_bytes"] > 1e8
    assert set(environment.versions("not-installed-here").values()) == {None}
