"""Engines of a bundle for Triton: which one a GPU takes, and what was checked about it."""

from collections.abc import Iterable
from typing import Any

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import EngineEntry, Variant
from variator_export.core.errors import UserError
from variator_export.engines.compatibility import AMPERE_PLUS
from variator_export.engines.targets import find_engine_target

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"


def largest_batch(bundle: BundleFiles, entry: EngineEntry) -> int:
    """The largest batch that a profile of an engine takes, in rows."""
    name = bundle.manifest.backbone.inputs[0]
    return max(int(profile["shapes"][name][2][0]) for profile in bundle.sidecar(entry)["profiles"])


def require_verified_somewhere(bundle: BundleFiles, entry: EngineEntry) -> None:
    """Refuse an engine that was not verified on any GPU, or that failed on one.

    Raises:
        UserError: It was not, or it did.
    """
    records = bundle.engine_records(entry)
    if not records or not all(record.passed for record in records):
        raise UserError(
            f"{bundle.path / entry.engine}: {bundle.engine_status(entry)}.",
            f"Verify it on the GPU: variator-export verify {bundle.path} --target {entry.target}. To export "
            "it anyway: --allow-unverified.",
        )


def engines_by_gpu(
    bundle: BundleFiles, variant: Variant, wanted: Iterable[str], version: str | None
) -> dict[str, EngineEntry]:
    """The engines of a variant by the GPU that takes them: `sm89`, or `ampere-plus` for all from sm80 on.

    Args:
        bundle: The bundle.
        variant: The variant.
        wanted: Only for these compute capabilities; empty for all.
        version: Only of this version of TensorRT, or of all that begin with it: `11.4`. None for any.

    Raises:
        UserError: There is no engine, none for a GPU, or several for one.
    """
    found = bundle.engines(TENSORRT, variant.name)
    if version is not None:
        found = [e for e in found if f"{e.version}.".startswith(f"{version}.")]
    if not found:
        raise _no_engine(bundle, variant, version)
    by_gpu: dict[str, EngineEntry] = {}
    for entry in found:
        for gpu in entry.platform.split("+"):
            if gpu in by_gpu:
                raise UserError(
                    f"{bundle.path} has several engines of {variant.name} for {gpu}: {by_gpu[gpu].engine}, "
                    f"{entry.engine}.",
                    f"Name the version of Triton's TensorRT: --tensorrt-version {entry.version}",
                )
            by_gpu[gpu] = entry
    wanted = tuple(wanted)
    for gpu in wanted:
        if gpu not in by_gpu and AMPERE_PLUS not in by_gpu:
            raise UserError(
                f"{bundle.path} has no engine of {variant.name} for {gpu}; it has {', '.join(by_gpu)}.",
                f"Compile it on a machine with {gpu}, and merge: variator-export compile {bundle.path} "
                "--target tensorrt",
            )
    return {gpu: entry for gpu, entry in by_gpu.items() if not wanted or gpu in {*wanted, AMPERE_PLUS}}


def require_plan(bundle: BundleFiles, entry: EngineEntry, sidecar: dict[str, Any]) -> None:
    """Refuse an engine that Triton's TensorRT backend cannot open.

    Raises:
        UserError: The engine has no weights, or its header contradicts its sidecar.
    """
    if sidecar["options"]["strip_weights"]:
        raise UserError(
            f"{bundle.path / entry.engine} was built without weights, which Triton does not load into it.",
            f"Compile with them: variator-export compile {bundle.path} --target {entry.target} "
            f"--with-weights; or export --backend python --target {entry.target}.",
        )
    path = bundle.file(entry.engine)
    if (words := find_engine_target(entry.target).contradiction(path, entry.version)) is not None:
        raise UserError(
            f"{path}: its sidecar says {entry.target} {entry.version}, and {words}.",
            f"Compile it again: variator-export compile {bundle.path} --target {entry.target}",
        )


def _no_engine(bundle: BundleFiles, variant: Variant, version: str | None) -> UserError:
    others = bundle.engines(TENSORRT, variant.name)
    if others:
        return UserError(
            f"{bundle.path} has no engine of {variant.name} by TensorRT {version}.",
            f"It has some by {', '.join(sorted({entry.version for entry in others}))}.",
        )
    compile_it = f"variator-export compile {bundle.path} --target {TENSORRT}, on a machine with the GPU"
    if bundle.engines(TENSORRT_RTX, variant.name):
        return UserError(
            f"{bundle.path} has engines of {variant.name} for {TENSORRT_RTX} alone. Triton's TensorRT "
            "backend cannot open plans of TensorRT for RTX: they are another format, of another library.",
            f"Compile for Triton: {compile_it}. Or export --backend python --target {TENSORRT_RTX}, whose "
            "Python needs TensorRT for RTX.",
        )
    return UserError(f"{bundle.path} has no engine of {variant.name} for {TENSORRT}.", compile_it)
