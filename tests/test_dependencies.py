"""The ranges of the dependencies begin with constraints-oldest.txt and hold constraints.txt."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
# TensorRT is compared with one version, onnxruntime stands for onnxruntime-gpu, Ray takes too long to be run
# twice, Triton is 1 GB, and nobody installs the rest beside something else.
NOT_RUN_AT_THEIR_OLDEST = {
    *("fused", "ray", "tensorrt", "tensorrt-rtx", "onnxruntime-gpu", "torchao"),
    *("clients", "demo", "docs", "dev"),
}


def _pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(distribution): Version(version) for distribution, version in pairs}


def _ranges() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"]]
    lines += [line for name in extras.keys() - NOT_RUN_AT_THEIR_OLDEST for line in extras[name]]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def test_the_oldest_versions_are_the_lower_ends_of_the_ranges() -> None:
    lower = {
        name: Version(clause.version)
        for name, requirement in _ranges().items()
        for clause in requirement.specifier
        if clause.operator == ">="
    }
    assert _pins("constraints-oldest.txt") == lower


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_what_the_tests_run_with_is_in_the_ranges(file: str) -> None:
    pins = _pins(file)
    for name, requirement in _ranges().items():
        assert pins[name] in requirement.specifier, f"{file} pins {name} outside {requirement}"
