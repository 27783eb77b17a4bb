"""The extras of this package: their purposes and which dependencies are installed; none is imported."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement

from variator_export.core.environment import DISTRIBUTION, install_command, installed_version

# The purpose of each extra, shown by `doctor`.
PURPOSES = {
    "onnxruntime": "run bundles",
    "onnxruntime-gpu": "run bundles, with ONNX Runtime for NVIDIA GPUs",
    "export": "build and verify bundles",
    "tensorrt-rtx": "build engines for GeForce RTX and RTX PRO GPUs, on any machine",
    "tensorrt": "build TensorRT engines, on a machine with the GPU",
    "openvino": "run and time bundles on OpenVINO, on CPUs",
    "alternatives": "time CTranslate2 and NNCF beside bundles",
    "torchao": "time torchao beside bundles",
    "fused": "run plugins in PyTorch by fused kernels, on NVIDIA GPUs",
    "train": "train plugins (in addition to export)",
    "evaluate": "measure quality",
    "parquet": "read and write Parquet with run and embed",
    "report": "write the report",
    "serve": "serve bundles over HTTP",
    "ray": "serve bundles on several machines",
    "demo": "the backbone of the default recipe",
}


@dataclass(frozen=True)
class Dependency:
    """A distribution that an extra needs.

    Attributes:
        distribution: The distribution's name.
        needed: The supported versions, for example `>=2.13,<2.14`.
        installed: The installed version. None if the distribution is not installed.
        fits: Whether the installed version is supported.
    """

    distribution: str
    needed: str
    installed: str | None
    fits: bool


@dataclass(frozen=True)
class Extra:
    """An extra of this package.

    Attributes:
        name: The extra's name.
        purpose: The purpose of the extra.
        dependencies: The distributions that the extra needs.
        install: The command that installs the extra.
    """

    name: str
    purpose: str
    dependencies: tuple[Dependency, ...]
    install: str

    @property
    def state(self) -> str:
        """`ready`, `not installed`, `incomplete` or `another version`; `unknown` in an older installation."""
        if not self.dependencies:
            return "unknown"
        if all(dependency.fits for dependency in self.dependencies):
            return "ready"
        missing = [dependency.installed is None for dependency in self.dependencies]
        if all(missing):
            return "not installed"
        return "incomplete" if any(missing) else "another version"


def extras() -> list[Extra]:
    """All extras with their installation state; empty if this package itself is not installed."""
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []
    requirements = [Requirement(line) for line in lines]
    found = []
    for name, purpose in PURPOSES.items():
        wanted = [r for r in requirements if r.marker is not None and r.marker.evaluate({"extra": name})]
        dependencies = tuple(_dependency(requirement) for requirement in wanted)
        found.append(Extra(name, purpose, dependencies, install_command(name)))
    return found


def _dependency(requirement: Requirement) -> Dependency:
    installed = installed_version(requirement.name)
    fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
    return Dependency(requirement.name, str(requirement.specifier), installed, fits)
