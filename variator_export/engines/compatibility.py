"""Compatibility of an engine with a machine, judged by the sidecar, without a GPU or TensorRT."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from variator_export.core.errors import UsageError
from variator_export.core.gpu import first_gpu

# Engine platforms besides compute capabilities: all GPUs of the target, and sm80 and later.
PORTABLE, AMPERE_PLUS = "portable", "ampere-plus"
_CAPABILITY = re.compile(r"sm\d{2,3}")
_VERSION = re.compile(r"(?P<target>[a-z-]+)-(?P<version>\d+(\.\d+)*)")


@dataclass(frozen=True)
class TargetMachine:
    """A machine that might run an engine.

    Attributes:
        name: Name of the machine in messages.
        capability: Compute capability of the machine's GPU, for example `sm89`; None if it has no GPU.
        versions: TensorRT versions by target; a missing target is not installed.
    """

    name: str
    capability: str | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Verdict:
    """Result of checking whether a machine can run an engine.

    Attributes:
        runs: Whether the machine can run the engine.
        why: The obstacle, or the GPUs and the version that the machine was compared with.
        remedy: Action that removes the obstacle; None if the engine runs.
    """

    runs: bool
    why: str
    remedy: str | None = None


def this_machine() -> TargetMachine:
    """The machine that this process runs on."""
    from variator_export.engines.targets import engine_targets

    gpu = first_gpu()
    found = {name: next(iter(target.versions().values())) for name, target in engine_targets().items()}
    versions = {name: version for name, version in found.items() if version is not None}
    return TargetMachine("this machine", gpu.capability if gpu else None, versions)


def parse_machine(text: str) -> TargetMachine:
    """Parse a machine as a user writes it: `sm90,tensorrt-11.4`.

    Raises:
        UsageError: A part is neither a compute capability nor a TensorRT with its version, or the text does
            not name exactly one GPU and at least one TensorRT.
    """
    from variator_export.engines.targets import engine_targets

    capability, versions = None, {}
    for part in text.split(","):
        if _CAPABILITY.fullmatch(part):
            if capability is not None:
                raise UsageError(f"--for {text} names two GPUs.", "Check one GPU at a time.")
            capability = part
        elif (match := _VERSION.fullmatch(part)) and match["target"] in engine_targets():
            versions[match["target"]] = match["version"]
        else:
            raise UsageError(f"{part!r} in --for {text} is not a machine.", "--for sm90,tensorrt-11.4")
    if capability is None or not versions:
        raise UsageError(f"--for {text} does not name a GPU and a TensorRT.", "--for sm90,tensorrt-11.4")
    return TargetMachine("that machine", capability, versions)


def can_run(sidecar: Mapping[str, Any], place: TargetMachine) -> Verdict:
    """Check whether a machine can run an engine.

    Args:
        sidecar: Sidecar of the engine.
        place: The machine.
    """
    from variator_export.engines.targets import find_engine_target

    target, built = sidecar["target"], str(sidecar["version"])
    builder, platform = find_engine_target(target), str(sidecar["platform"])
    (distribution,) = builder.distributions
    there = place.versions.get(target)
    again = f"variator-export compile BUNDLE --target {target}"
    if place.capability is None:
        return Verdict(False, f"{place.name} has no GPU", "name another one: --for sm90,tensorrt-11.4")
    if there is None:
        return Verdict(False, f"{place.name} has no {target}", f"install {distribution} {built} there")
    if not builder.runs_on(platform, place.capability):
        return Verdict(
            False,
            f"it was built for {builder.gpus(platform)}, and {place.name} has {place.capability}",
            builder.how_to_build_for(place.capability),
        )
    same = is_same_version(built, there)
    if not same and not (sidecar["options"]["version_compatible"] and _is_later(built, there)):
        return Verdict(
            False,
            f"it was built by {target} {built}, and {place.name} has {there}",
            f"install {distribution} {built} there, or compile it with {there}: {again}",
        )
    needs = "" if same else f"; on {there} with its lean runtime: {how_to_get_lean_runtime(sidecar)}"
    return Verdict(True, f"{builder.gpus(platform)}, {target} {built}{needs}")


def how_to_get_lean_runtime(sidecar: Mapping[str, Any]) -> str:
    """Advice for opening an engine with a TensorRT that is later than the one that built it."""
    built, cuda = str(sidecar["version"]), sidecar.get("cuda")
    package = f"tensorrt-lean-cu{cuda}-libs" if cuda else "tensorrt-lean-cu12-libs or tensorrt-lean-cu13-libs"
    return (
        f"pip install {package}, version {built}, and --lean-runtime "
        f"SITE-PACKAGES/tensorrt_lean_libs/libnvinfer_lean.so.{built.split('.')[0]}"
    )


def is_same_version(built: str, there: str) -> bool:
    """Whether two versions are the same as far as both go: a user writes 11.4, a sidecar 11.4.0.106.

    The build number may differ.
    """
    a, b = _as_far_as_both_go(built, there)
    return a == b


def _is_later(built: str, there: str) -> bool:
    """Whether a version is a later one, within a major version.

    A later major version can open plans too, but few of its APIs are those of the plan.
    """
    a, b = _as_far_as_both_go(built, there)
    return a[0] == b[0] and b >= a


def _as_far_as_both_go(built: str, there: str) -> tuple[list[int], list[int]]:
    a, b = ([int(part) for part in version.split(".")[:3]] for version in (built, there))
    shorter = min(len(a), len(b))
    return a[:shorter], b[:shorter]
