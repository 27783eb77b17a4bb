"""Verifying a finished bundle against eager PyTorch, or against what eager gave when it was built."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from variator_export.bundle import Bundle
from variator_export.core.environment import (
    install_command,
    is_importable,
    machine,
    require_onnxruntime,
    versions,
)
from variator_export.core.errors import UserError
from variator_export.core.manifest import Variant
from variator_export.core.progress import Progress
from variator_export.engines.base import Runner
from variator_export.engines.onnxruntime import plugin_inputs
from variator_export.engines.onnxruntime_graph import OnnxRuntimeGraph
from variator_export.pipeline.eager_bundle import EagerBundle
from variator_export.pipeline.reports import VERIFICATION_REPORT, store_report
from variator_export.pipeline.verified_graph import AS_IT_IS, how_it_runs, open_for_verification
from variator_export.stages.cases import REAL_TEXT
from variator_export.stages.invariances import check_invariances
from variator_export.stages.reference import EAGER, load_reference
from variator_export.stages.verify import Finding, verify_graph

if TYPE_CHECKING:
    from variator_export.stages.bisect import Bisection

STORED = "what eager PyTorch, float64, CPU, gave when the bundle was built"
ReferenceChoice = Literal["auto", "eager", "stored"]


@dataclass(frozen=True)
class SummaryRow:
    """All findings of one check of one graph.

    Attributes:
        count: How many there are.
        worst: The largest multiple of the base error; None: no multiple would have passed.
        allowed: The multiple that is allowed.
        failed: How many are outside it.
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
    """What `verify` found.

    Attributes:
        bundle: The bundle's folder.
        reference: What the graphs were compared with.
        findings: All that was looked at, by variant.
        graphs: The sha256 of each graph that ran.
        verified_at: ISO 8601, UTC.
        machine: This machine.
        versions: Of what ran.
        bisections: Where graphs that failed leave eager PyTorch, if that was asked for.
        ran: How the graphs ran.
    """

    bundle: Path
    reference: str
    findings: dict[str, tuple[Finding, ...]]
    graphs: dict[str, str]
    verified_at: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    bisections: tuple["Bisection", ...] = ()
    ran: str = AS_IT_IS

    @property
    def failures(self) -> list[Finding]:
        """What is outside its limit, the worst first."""
        failed = [f for findings in self.findings.values() for f in findings if not f.passed]
        return sorted(failed, key=lambda finding: finding.badness, reverse=True)

    def summary(self) -> list[SummaryRow]:
        """One row for each variant, graph and check."""
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for variant, findings in self.findings.items():
            for f in findings:
                groups.setdefault((variant, f.question.graph, f.question.check), []).append(f)
        rows = []
        for group, members in groups.items():
            worst = max(members, key=lambda finding: finding.badness)
            failed = sum(not finding.passed for finding in members)
            rows.append(SummaryRow(*group, len(members), worst.used, worst.allowed, failed))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "bundle": str(self.bundle),
            "ran": self.ran,
            "passed": not self.failures,
            "reference": self.reference,
            "graphs": self.graphs,
            "verified_at": self.verified_at,
            "machine": self.machine,
            "versions": self.versions,
            "findings": {name: [f.as_dict() for f in found] for name, found in self.findings.items()},
            "bisections": [bisection.as_dict() for bisection in self.bisections],
        }


def verify(
    bundle: str | Path,
    variants: Sequence[int | str] | None = None,
    *,
    reference: ReferenceChoice = "auto",
    backbone: str | None = None,
    profile_shapes: bool = True,
    reproduction: Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Verify the graphs of a bundle on ONNX Runtime, each variant by its own graph and the any-ratio graph.

    Args:
        bundle: The bundle's folder.
        variants: Ratios or names; None: all.
        reference: `eager`: eager PyTorch; `stored`: what it gave for the small cases when the bundle was
            built; `auto`: eager where torch and transformers are installed.
        backbone: Where the backbone is; None: where it was when the bundle was built.
        profile_shapes: With eager, verify at the smallest, the usual and the largest shape of the engines'
            profile too.
        reproduction: Bisect what fails, and write a folder that shows it into this one; needs eager.
        progress: Is told what happens.

    Raises:
        UserError: The bundle is damaged, what the reference needs is not there, or the folder of the
            reproduction holds files.
    """
    if reproduction is not None and reproduction.exists() and any(reproduction.iterdir()):
        raise UserError(
            f"{reproduction} holds files already.", "Remove it, or choose another --reproduction."
        )
    progress = progress or Progress()
    opened = Bundle.load(bundle)
    require_onnxruntime()
    manifest = opened.manifest
    found = [opened.variant(v) for v in variants] if variants else manifest.variants
    chosen = list({variant.name: variant for variant in found}.values())
    is_eager = reference == "eager" or (
        reference == "auto" and all(map(is_importable, ("torch", "transformers")))
    )
    if reproduction is not None and not is_eager:
        raise UserError(
            "Bisecting runs eager PyTorch module by module.",
            f"Leave it out, or install what it needs: {install_command('export')}",
        )
    eager = EagerBundle(opened, backbone, profile_shapes=profile_shapes) if is_eager else None
    any_ratio = open_for_verification(opened.graph(manifest.any_ratio["model"]), {}, manifest.precision)
    opened.check_unchanged()
    findings = {
        variant.name: tuple(_verify_variant(opened, variant, any_ratio, eager, progress))
        for variant in chosen
    }
    bisections: list[Bisection] = []
    if reproduction is not None and eager is not None:
        for variant in chosen:
            bisections += eager.bisect(variant, findings[variant.name], reproduction)
    graphs = [*manifest.any_ratio.values(), *(v.graphs["model"] for v in chosen)]
    return Verification(
        bundle=opened.path,
        reference=STORED if eager is None else EAGER,
        findings=findings,
        graphs={name: manifest.files[name].sha256 for name in graphs},
        verified_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        ran=how_it_runs(manifest.precision),
        versions=versions("variator-export", "onnxruntime", "onnxruntime-gpu", "torch", "transformers"),
        bisections=tuple(bisections),
    )


def store_verification(verification: Verification) -> Path:
    """Keep a result in its bundle.

    Raises:
        UserError: The bundle cannot be written.
    """
    state = "The bundle was verified; the report of it is not stored."
    return store_report(verification.bundle, VERIFICATION_REPORT, verification.as_dict(), state)


def _verify_variant(
    bundle: Bundle,
    variant: Variant,
    any_ratio: OnnxRuntimeGraph,
    eager: EagerBundle | None,
    progress: Progress,
) -> list[Finding]:
    reference = (
        load_reference(bundle.file(variant.reference))
        if eager is None
        else eager.reference(variant, progress)
    )
    real_text = next(expected for expected in reference if expected.case.name == REAL_TEXT)
    backbone = bundle.manifest.backbone
    own, precision = variant.graphs["model"], bundle.manifest.precision
    runners: dict[str, Runner] = {
        own: open_for_verification(bundle.graph(own), {}, precision),
        bundle.manifest.any_ratio["model"]: any_ratio.with_plugin(plugin_inputs(bundle, variant)),
    }
    findings: list[Finding] = []
    with progress.bar(f"verify {variant.name}", len(runners) * (len(reference) + 1)) as advance:
        for graph, runner in runners.items():
            findings += verify_graph(graph, runner, reference, advance)
            findings += check_invariances(
                graph,
                runner,
                real_text,
                ratio=variant.ratio,
                pad_token_id=backbone.pad_token_id,
                token_outputs=backbone.token_outputs,
                max_length=backbone.max_length,
            )
            advance()
    return findings
