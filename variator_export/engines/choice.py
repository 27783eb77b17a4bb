"""Choice of the engine of a bundle that this machine can run, and the check that it was verified."""

from typing import Any

from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import EngineEntry
from variator_export.core.errors import UserError
from variator_export.core.gpu import Gpu
from variator_export.core.parts import DECODER
from variator_export.engines.compatibility import can_run, is_same_version, this_machine


def choose_engine(
    bundle: BundleFiles, target: str, name: str, part: str | None = None
) -> tuple[EngineEntry, dict[str, Any]]:
    """Choose the engine of a variant that this machine can run.

    Args:
        bundle: The bundle.
        target: The target.
        name: The variant's name, or `any-ratio`.
        part: The part of the model. None for the part that plugins are in.

    Returns:
        The engine and its sidecar.

    Raises:
        UserError: The bundle has no such engine.
    """
    place = this_machine()
    what = name if part is None else part if name == ANY_RATIO else f"the decoder {name}"
    reasons, found = [], []
    for entry in bundle.engines(target, name, part):
        sidecar = bundle.sidecar(entry)
        verdict = can_run(sidecar, place)
        if verdict.runs:
            found.append((entry, sidecar))
        reasons.append(f"{entry.engine}: {verdict.why}")
    if found:
        # An engine of an earlier version needs that version's lean runtime.
        return max(found, key=lambda each: is_same_version(each[0].version, place.versions[target]))
    if reasons:
        raise UserError(
            f"{bundle.path} has no engine of {what} for this machine. {'; '.join(reasons)}.",
            f"variator-export doctor {bundle.path} prints what to do for each.",
        )
    raise UserError(
        f"{bundle.path} has no engine of {what} for {target}.",
        f"Build it: {compile_command(bundle, target, name, part)}",
    )


def compile_command(bundle: BundleFiles, target: str, name: str, part: str | None = None) -> str:
    """The command that builds an engine. A decoder is built with any variant that has it."""
    if part == DECODER:
        with_it = (v.name for v in bundle.manifest.variants if v.decoder_name == name)
        chosen = "" if name == ANY_RATIO else f" --variant {next(with_it, name)}"
    else:
        chosen = f" --variant {name}"
    return f"variator-export compile {bundle.path} --target {target}{chosen}"


def require_verified(bundle: BundleFiles, entry: EngineEntry, gpu: Gpu | None) -> None:
    """Refuse an engine that was not verified on a GPU of this kind, or that failed there.

    Raises:
        UserError: The engine has no passing record on this kind of GPU.
    """
    records = bundle.engine_records(entry)
    here = [record for record in records if gpu is not None and record.gpu == gpu.name]
    if any(record.passed for record in here):
        return
    known = "; ".join(map(str, here or records)) or "was built and never verified on a device"
    where = "" if here or not records or gpu is None else f", and this is {gpu.name}"
    needs = " with PyTorch installed, which a decoder needs" if entry.is_shared else ""
    raise UserError(
        f"{bundle.path / entry.engine} {known}{where}.",
        f"Verify it here{needs}: variator-export verify {bundle.path} --target {entry.target}. To run it "
        "anyway: --allow-unverified (in Python allow_unverified=True).",
    )
