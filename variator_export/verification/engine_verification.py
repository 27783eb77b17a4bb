"""What the verification of engines leaves behind: a record of each, which `run` and sessions ask for."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from variator_export.bundle.engine_records import EngineRecord
from variator_export.bundle.manifest import Manifest

if TYPE_CHECKING:
    from variator_export.verification.bundle_verification import Verification


def engine_records(verification: "Verification", gpu: str, manifest: Manifest) -> list[EngineRecord]:
    """Return one record for each engine that ran.

    Args:
        verification: The result of `verify` on the target of the engines.
        gpu: The GPU that the engines ran on.
        manifest: The bundle's manifest. An engine that takes plugins as inputs passes only after each
            variant has passed; the decoder of all variants, after one.
    """
    records = []
    entries = {entry.engine: entry for entry in manifest.engines}
    for engine, sha256 in verification.graphs.items():
        own = [f for found in verification.findings.values() for f in found if f.question.graph == engine]
        entry, variant = entries[engine], entries[engine].variant
        # The precision was read of the variants' own engines, which are encoders where there are decoders.
        imprecise = not entry.is_shared and variant in verification.imprecise
        passed = all(finding.passed for finding in own) and not imprecise
        original = [v.name for v in manifest.variants if v.assembly_spec is None]
        if passed and entry.takes_plugins and not verification.findings.keys() >= set(original):
            continue
        precision = None if entry.is_shared else verification.precisions.get(variant)
        worst = max(own, key=lambda finding: finding.severity)
        batch_size, length = max((finding.question.input_shape for finding in own), key=math.prod)
        records.append(
            EngineRecord(
                sha256=sha256,
                gpu=gpu,
                passed=passed,
                worst=worst.used,
                allowed=worst.allowed,
                largest=f"{batch_size}x{length}",
                reference=verification.reference,
                verified_at=verification.verified_at,
                precision=None if precision is None else asdict(precision),
            )
        )
    return records
