"""What is missing is named with the command that installs it."""

import importlib.metadata

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
    assert environment.install_command("onnxruntime") in str(raised.value.hint)


def test_missing_packages_to_make_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.require_export()
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match="Exporting graphs needs the Python package onnxscript") as raised:
        environment.require_export()
    assert environment.install_command("export") in str(raised.value.hint)


def test_a_machine_is_described_without_guessing() -> None:
    found = environment.machine()
    assert found["cpu_cores"] >= 1
    assert found["memory_bytes"] > 1e8
    assert set(environment.versions("not-installed-here").values()) == {None}


@pytest.mark.parametrize(
    ("flags", "int8", "bfloat16"),
    [
        ("fpu avx2 avx512_vnni amx_bf16", ["avx512_vnni"], ["amx_bf16"]),
        ("fpu avx2", [], []),
        ("fp asimddp i8mm bf16", ["asimddp", "i8mm"], ["bf16"]),
        (None, None, None),
    ],
)
def test_instructions_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, flags: str | None, int8: list[str] | None, bfloat16: list[str] | None
) -> None:
    monkeypatch.setattr(environment, "_cpu_info", lambda *keys: flags if "flags" in keys else None)
    machine = environment.machine()
    assert (machine["int8_instructions"], machine["bfloat16_instructions"]) == (int8, bfloat16)


@pytest.mark.parametrize(
    ("record", "command"),
    [
        (None, "pip install 'variator-export[export]'"),
        ("not JSON", "pip install 'variator-export[export]'"),
        (
            '{"url": "file:///a%20b/clone", "dir_info": {"editable": true}}',
            "pip install --editable '/a b/clone[export]'",
        ),
        ('{"url": "file:///clone", "dir_info": {}}', "pip install '/clone[export]'"),
        (
            '{"url": "file:///d/variator_export-1-py3-none-any.whl", "archive_info": {}}',
            "pip install '/d/variator_export-1-py3-none-any.whl[export]'",
        ),
        (
            '{"url": "https://x.org/v.whl", "archive_info": {}}',
            "pip install 'variator-export[export] @ https://x.org/v.whl'",
        ),
        (
            '{"url": "https://x.org/v.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}}',
            "pip install 'variator-export[export] @ git+https://x.org/v.git@0a1b'",
        ),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came(
    monkeypatch: pytest.MonkeyPatch, record: str | None, command: str
) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return record

    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Distribution())
    assert environment.install_command("export") == command
