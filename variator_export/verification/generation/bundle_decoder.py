"""Verification of the decoder of a finished bundle."""

from variator_export.bundle.manifest import Variant
from variator_export.core.progress import Progress
from variator_export.verification.checks import LeftOut
from variator_export.verification.eager_bundle import EagerBundle
from variator_export.verification.generation.checks import ALONE, FORCED, GREEDY, Parting
from variator_export.verification.judging.judge import Finding
from variator_export.verification.runs import Runs


def verify_decoder(
    variant: Variant, runs: Runs, eager: EagerBundle | None, progress: Progress
) -> tuple[list[Finding], list[Parting], list[LeftOut]]:
    """Check the decoder with a variant's encoder.

    Returns:
        The findings, the rows of greedy search that part from eager PyTorch's, and what was left out.
    """
    if eager is None:
        why = ("the stored reference has no scores of a decoder",)
        return [], [], [LeftOut(runs.decoder_file(variant), check, why) for check in (FORCED, ALONE, GREEDY)]
    decoder = runs.decoder(variant)
    found = eager.generation(variant, decoder, progress)
    left = [LeftOut(decoder.file, check, tuple(cases)) for check, cases in found.left_out.items()]
    return found.findings, found.partings, left
