"""Verification of a finished bundle, against eager PyTorch or against its outputs stored by the build."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from variator_export.bundle.engine_records import (
    ENGINE_RECORDS,
    read_records,
    records_document,
)
from variator_export.bundle.manifest import LEAST_SHARE, Variant
from variator_export.bundle.reports import VERIFICATION_REPORT, engine_verification_report, store_report
from variator_export.core.environment import (
    install_command,
    is_importable,
    machine,
    require_onnxruntime,
    versions,
)
from variator_export.core.errors import UserError
from variator_export.core.precision import find_precision
from variator_export.core.progress import Progress
from variator_export.engines.base import Runner
from variator_export.engines.layers import EnginePrecision
from variator_export.engines.targets import GRAPHS, TARGETS, distributions, engine_targets
from variator_export.sessions import Bundle
from variator_export.verification.checks import CheckedVariant, LeftOut, check_variant
from variator_export.verification.consistency import check_steps
from variator_export.verification.eager_bundle import EagerBundle
from variator_export.verification.engine_verification import engine_records
from variator_export.verification.generation.bundle_decoder import verify_decoder
from variator_export.verification.generation.checks import Parting
from variator_export.verification.judging.error_budget import quantization_share
from variator_export.verification.judging.judge import QUANTIZATION_UNIT, Finding
from variator_export.verification.reference import EAGER, load_reference
from variator_export.verification.runs import Engines, Graphs, Runs, TargetGraphs
from variator_export.verification.verified_graph import AS_IT_IS

if TYPE_CHECKING:
    from variator_export.verification.bisection.bisect import Bisection
    from variator_export.verification.quantized.losses import QuantizationLoss

STORED = "the outputs of eager PyTorch, float64, CPU, stored when the bundle was built"
ReferenceChoice = Literal["auto", "eager", "stored"]
ProfileShapes = Literal["none", "usual", "all"]


@dataclass(frozen=True)
class SummaryRow:
    """Summary of all findings of one check of one graph.

    Attributes:
        variant: The variant's name.
        graph: The file that ran.
        check: The check's name.
        count: Number of findings.
        worst: The largest multiple of the base error. None if no multiple would have passed.
        allowed: The multiple that is allowed.
        failed: Number of findings outside the limit.
    """

    variant: str
    graph: str
    check: str
    count: int
    worst: float | None
    allowed: float
    failed: int


@dataclass(frozen=True)
class Verification:
    """Result of `verify`.

    Attributes:
        bundle: The bundle's folder.
        reference: A description of the reference that the graphs were compared with.
        findings: All findings, by variant.
        graphs: The sha256 of each graph or engine that ran.
        variants: The hash of each variant that was verified (`BundleFiles.variant_hashes`).
        verified_at: Time of the verification, ISO 8601, UTC.
        machine: Description of this machine.
        versions: Versions of the packages involved.
        bisections: The bisections of the graphs that failed, if they were requested.
        target: The target that ran: `onnxruntime` for graphs, or the name of an engine target.
        ran: How the graphs or engines ran.
        gpu: The GPU they ran on. None if they ran on the CPU.
        precisions: The types that the engines compute in, by variant.
        partings: The rows of greedy search that part from eager PyTorch's, by variant, and the step.
        left_out: The shapes and cases that were not checked, by variant: no profile of an engine covers them,
            or the property does not hold for the model itself.
        profile_shapes: The shapes of the engines' profiles that were verified, as in `verify`. `none` with a
            stored reference.
        losses: What the quantisation changes, by variant. Empty for other precisions, and with a stored
            reference.
    """

    bundle: Path
    reference: str
    findings: dict[str, tuple[Finding, ...]]
    graphs: dict[str, str]
    variants: dict[str, str]
    verified_at: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    bisections: tuple["Bisection", ...] = ()
    target: str = "onnxruntime"
    ran: str = AS_IT_IS
    gpu: str | None = None
    precisions: Mapping[str, EnginePrecision] = field(default_factory=dict)
    left_out: Mapping[str, tuple[LeftOut, ...]] = field(default_factory=dict)
    partings: Mapping[str, tuple[Parting, ...]] = field(default_factory=dict)
    profile_shapes: ProfileShapes = "none"
    losses: Mapping[str, tuple["QuantizationLoss", ...]] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What the numbers in the table are multiples of, as a sentence."""
        units = {finding.unit for findings in self.findings.values() for finding in findings}
        if QUANTIZATION_UNIT not in units:
            return "Numbers are multiples of eager PyTorch's own rounding error."
        given = " Given the graph's rounding: multiples of eager PyTorch's own error in float32."
        return f"Numbers are multiples of {QUANTIZATION_UNIT}.{given if len(units) > 1 else ''}"

    @property
    def too_lossy(self) -> "list[QuantizationLoss]":
        """What the quantisation changes by more than the recipe allows."""
        return [loss for losses in self.losses.values() for loss in losses if not loss.passed]

    @property
    def failures(self) -> list[Finding]:
        """The findings outside their limit, the worst first."""
        failed = [f for findings in self.findings.values() for f in findings if not f.passed]
        return sorted(failed, key=lambda finding: finding.severity, reverse=True)

    @property
    def imprecise(self) -> dict[str, str]:
        """Variants that compute too much in another type, as TensorRT reports it; with a message for each."""
        return {
            name: f"{found.other:.1%} of its multiply-accumulates are in another type, TensorRT reports"
            for name, found in self.precisions.items()
            if found.other > 1 - LEAST_SHARE
        }

    @property
    def passed(self) -> bool:
        """Whether every finding passed, every engine computes in its type, and no quantisation loses much."""
        return not self.failures and not self.imprecise and not self.too_lossy

    def summary(self) -> list[SummaryRow]:
        """Return one row for each variant, graph and check."""
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for variant, findings in self.findings.items():
            for f in findings:
                groups.setdefault((variant, f.question.graph, f.question.check), []).append(f)
        rows = []
        for group, members in groups.items():
            worst = max(members, key=lambda finding: finding.severity)
            failed = sum(not finding.passed for finding in members)
            rows.append(SummaryRow(*group, len(members), worst.used, worst.allowed, failed))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return {
            "bundle": str(self.bundle),
            "target": self.target,
            "ran": self.ran,
            "gpu": self.gpu,
            "precisions": {name: asdict(found) for name, found in self.precisions.items()},
            "passed": self.passed,
            "reference": self.reference,
            "graphs": self.graphs,
            "variants": self.variants,
            "verified_at": self.verified_at,
            "machine": self.machine,
            "versions": self.versions,
            "profile_shapes": self.profile_shapes,
            "partings": {name: [p.as_dict() for p in found] for name, found in self.partings.items()},
            "left_out": {name: [asdict(entry) for entry in left] for name, left in self.left_out.items()},
            "findings": {name: [f.as_dict() for f in found] for name, found in self.findings.items()},
            "quantization": {name: [loss.as_dict() for loss in found] for name, found in self.losses.items()},
            "bisections": [bisection.as_dict() for bisection in self.bisections],
        }


def verify(
    bundle: str | Path,
    variants: Sequence[int | str] | None = None,
    *,
    target: str = "onnxruntime",
    reference: ReferenceChoice = "auto",
    backbone: str | None = None,
    profile_shapes: ProfileShapes | None = None,
    seed: int | None = None,
    reproduction: Path | None = None,
    lean_runtime: Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Verify a bundle's graphs or engines.

    Each variant is verified twice: with its own graph or engine, and with the one that runs every ratio.

    Args:
        bundle: The bundle's folder.
        variants: Ratios or names. None means all.
        target: `onnxruntime` for the graphs, on the CPU. `tensorrt-rtx` or `tensorrt` for the engines, on the
            GPU of this machine.
        reference: `eager` for eager PyTorch, `stored` for its outputs on the small cases that the build
            stored, `auto` for `eager` if torch and transformers are installed and `stored` otherwise.
        backbone: The backbone's location. None means its location when the bundle was built.
        profile_shapes: With eager PyTorch, also verify at these shapes of the engines' profiles: `none`,
            `usual` (the smallest and the usual one of each profile), or `all` (the largest one too, which
            takes most of the time). None means `usual` for graphs, and `all` for engines, which may fail at
            one shape only.
        seed: Draw the random tokens, and 12 more shapes, from this seed. Requires eager PyTorch. None means
            the recipe's seed, and the fixed shapes alone.
        reproduction: Bisect the graphs that fail and write a reproduction of each fault into this folder.
            Requires eager PyTorch.
        lean_runtime: Library of the lean runtime of the TensorRT that built the engines, if the installed one
            is later.
        progress: Receives progress reports.

    Raises:
        NumbersDisagreeError: A stored file is not the one that the build verified, or not the backbone's.
        UserError: The bundle is damaged, something that the reference needs is missing, or the reproduction
            folder is not empty.
    """
    if reproduction is not None and reproduction.exists() and any(reproduction.iterdir()):
        raise UserError(
            f"{reproduction} already holds files.", "Remove it, or choose another --reproduction."
        )
    progress = progress or Progress()
    opened = Bundle.load(bundle)
    quantizes = find_precision(opened.manifest.precision).quantizes
    if reproduction is not None and quantizes:
        raise UserError(
            f"Bisection compares modules, and those of {opened.manifest.precision} differ by their rounding.",
            "Leave it out. The check given the graph's rounding names the output; `build` names the module "
            "that loses most.",
        )
    check_steps(opened)
    builder = engine_targets().get(target)
    if target == GRAPHS:
        require_onnxruntime()
    elif builder is None and reproduction is not None:
        raise UserError(
            f"A graph on {target} cannot be bisected.",
            "Verify it without --bisect, or bisect it on onnxruntime.",
        )
    manifest = opened.manifest
    found = [opened.variant(v) for v in variants] if variants else manifest.variants
    chosen = list({variant.name: variant for variant in found}.values())
    is_eager = reference == "eager" or (
        reference == "auto" and all(map(is_importable, ("torch", "transformers")))
    )
    if reproduction is not None and not is_eager:
        raise UserError(
            "Bisection runs eager PyTorch module by module.",
            f"Leave it out, or install what it needs: {install_command('export')}",
        )
    if seed is not None and not is_eager:
        raise UserError(
            "New shapes need eager PyTorch; the stored reference has the build's.",
            f"Leave out the seed, or install what it needs: {install_command('export')}",
        )
    runs: Runs
    if builder is not None:
        runs = Engines(opened, builder, chosen, lean_runtime=lean_runtime)
    else:
        runs = Graphs(opened) if target == GRAPHS else TargetGraphs(opened, TARGETS.find(target))
    profiles = profile_shapes or ("usual" if builder is None else "all")
    shapes = [] if profiles == "none" else runs.shapes(largest=profiles == "all")
    eager = EagerBundle(opened, backbone, shapes, seed) if is_eager else None
    opened.check_unchanged()
    precisions = {variant.name: runs.precision(variant) for variant in chosen}
    looked_at = {v.name: _verify_variant(opened, v, runs, eager, progress) for v in chosen}
    findings = {name: tuple(found) for name, (found, _) in looked_at.items()}
    losses: dict[str, tuple[QuantizationLoss, ...]] = {}
    if eager is not None and quantizes:
        for variant in chosen:
            more, lost = eager.quantization(variant, runs.graph_inputs(variant), progress)
            findings[variant.name] += tuple(more)
            losses[variant.name] = tuple(lost)
    left_out = {name: tuple(left) for name, (_, left) in looked_at.items()}
    partings: dict[str, tuple[Parting, ...]] = {}
    for variant in chosen if manifest.backbone.generates else ():
        more, parted, missing = verify_decoder(variant, runs, eager, progress)
        findings[variant.name] += tuple(more)
        left_out[variant.name] += tuple(missing)
        partings[variant.name] = tuple(parted)
    bisections: list[Bisection] = []
    if reproduction is not None and eager is not None:
        for variant in chosen:
            bisections += eager.bisect(variant, findings[variant.name], runs, reproduction, progress)
    graphs = sorted({f.question.graph for found in findings.values() for f in found})
    return Verification(
        bundle=opened.path,
        reference=STORED if eager is None else EAGER,
        findings=findings,
        graphs={name: manifest.files[name].sha256 for name in graphs},
        variants={name: value for name, value in opened.variant_hashes().items() if name in findings},
        verified_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        target=target,
        ran=runs.ran,
        gpu=runs.gpu,
        precisions={name: found for name, found in precisions.items() if found is not None},
        versions=versions(*("variator-export", "torch", "transformers"), *distributions()),
        bisections=tuple(bisections),
        left_out={name: left for name, left in left_out.items() if left},
        partings={name: found for name, found in partings.items() if found},
        profile_shapes="none" if eager is None else profiles,
        losses=losses,
    )


def store_verification(verification: Verification) -> Path:
    """Store a result in its bundle. For engines, also store one record each, which `run` checks.

    Raises:
        UserError: The bundle cannot be written.
    """
    if verification.gpu is not None:
        new = engine_records(verification, verification.gpu, Bundle.load(verification.bundle).manifest)
        records = [*read_records(verification.bundle), *new]
        state = "The engines were verified; their verification records are not stored."
        store_report(verification.bundle, ENGINE_RECORDS, records_document(records), state)
    state = "The bundle was verified; the verification report is not stored."
    target = verification.target
    name = VERIFICATION_REPORT if target == GRAPHS else engine_verification_report(target)
    content = {key: value for key, value in verification.as_dict().items() if key != "bundle"}
    return store_report(verification.bundle, name, content, state)  # without a path of this machine


def _verify_variant(
    bundle: Bundle,
    variant: Variant,
    runs: Runs,
    eager: EagerBundle | None,
    progress: Progress,
) -> tuple[list[Finding], list[LeftOut]]:
    reference = (
        load_reference(bundle.file(variant.reference), bundle.manifest.backbone.outputs)
        if eager is None
        else eager.reference(variant, progress)
    )
    backbone = bundle.manifest.backbone
    runners = runs.runners(variant)
    subject = CheckedVariant(
        variant.ratio,
        backbone.pad_token_id,
        backbone.token_outputs,
        backbone.max_length,
        padding_states_vary=backbone.padding_states_vary,
        masking=None if variant.plugin is None else variant.plugin.masking,
        quantized=quantization_share(bundle.manifest.precision) is not None,
    )
    with progress.bar(f"verify {variant.name}", len(runners) * (len(reference) + 1)) as advance:
        openers = {file: functools.partial(_as_it_is, runner) for file, runner in runners.items()}
        return check_variant(
            openers, reference, subject, supports_shape=runs.supports_shape, progress=advance
        )


def _as_it_is(runner: Runner) -> Runner:
    return runner
