"""`doctor`: what is installed and what is broken, without being broken by it."""

import json
import tomllib
from pathlib import Path

import pytest
from command_line import call

from variator_export.core import environment
from variator_export.core import extras as extras_module
from variator_export.core.environment import install_command
from variator_export.core.extras import PURPOSES, extras
from variator_export.reporting import diagnosis as doctor
from variator_export.reporting.diagnosis import diagnose


def _requires(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(extras_module, "requires", lambda _name: list(lines))


def test_every_extra_for_users_has_a_purpose() -> None:
    path = Path(__file__).parent.parent / "pyproject.toml"
    declared = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for_developers = {"dev", "docs", "clients"}
    assert declared.keys() - for_developers == PURPOSES.keys()


def test_states_of_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    _requires(
        monkeypatch,
        'numpy>=2; extra == "export"',
        'nothing-of-this-name>=1; extra == "export"',
        'numpy>=99; extra == "report"',
        'nothing-of-this-name>=1; extra == "tensorrt"',
        'numpy>=2; extra == "train"',
    )
    states = {extra.name: extra.state for extra in extras()}
    assert states["export"] == "incomplete"
    assert states["report"] == "another version"
    assert states["tensorrt"] == "not installed"
    assert states["train"] == "ready"
    assert states["demo"] == "unknown"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process died of signal 11"),
        ("raise OSError('libnvinfer.so.11: cannot open')", "OSError: libnvinfer.so.11: cannot open"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_what_cannot_be_imported_is_a_problem_and_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, code: str, expected: str
) -> None:
    monkeypatch.setattr(doctor, "_PROBES", {"onnxruntime": code})
    monkeypatch.setattr(doctor, "_TIMEOUT_SECONDS", 1 if "sleep" in code else 60)
    found = diagnose()
    assert [probe.works for probe in found.probes] == [False]
    assert found.problems[0] == f"onnxruntime cannot be imported: {expected}"


def test_two_distributions_in_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBES", {})
    monkeypatch.setattr(environment, "installed_version", lambda _name: "1.0")
    _requires(monkeypatch)
    assert "overwrite each other's files" in diagnose().problems[0]


def test_a_bundle_is_looked_at(monkeypatch: pytest.MonkeyPatch, bundle_copy: Path) -> None:
    monkeypatch.setattr(doctor, "_PROBES", {"onnxruntime": "print('1.31, CPUExecutionProvider')"})
    found = diagnose(bundle_copy).bundle
    assert found is not None
    assert found["runs_on"] == ["onnxruntime"]
    assert found["backbone"].startswith("here")
    (bundle_copy / "ratio-2.onnx").write_bytes(b"")
    result = call("doctor", str(bundle_copy))
    assert result.returncode == 1
    assert "ratio-2.onnx" in result.stderr


def test_the_command_says_what_to_install() -> None:
    result = call("doctor", "--format", "json")
    assert result.returncode == 0, result.stderr
    install = {extra["name"]: extra["install"] for extra in json.loads(result.stdout)["extras"]}
    assert install["tensorrt"] == install_command("tensorrt")
    assert "[tensorrt]" in call("doctor").stdout  # not taken for markup
