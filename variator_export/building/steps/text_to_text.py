"""The steps of a build for models that generate text: what is special about them."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from variator_export.building.context import VERIFIED_BY, BuildContext
from variator_export.building.plan import VariantPlan
from variator_export.bundle.parts import DECODER, ENCODER
from variator_export.bundle.reports import build_verification_report
from variator_export.core.axes import past_names, present_names
from variator_export.core.environment import require_onnxruntime, versions
from variator_export.core.errors import UserError
from variator_export.core.json_file import write_json
from variator_export.engines.targets import GRAPHS
from variator_export.generation.settings import read_settings
from variator_export.verification.judging.judge import refuse_failures
from variator_export.verification.verified_graph import how_it_runs, open_for_verification

if TYPE_CHECKING:
    from variator_export.model.backbone_info import BackboneInfo

_GENERATED_BY = (*VERIFIED_BY, "generation")


def check_recipe(context: BuildContext) -> None:
    """Refuse what models that generate text do not have, before anything slow starts.

    Raises:
        UserError: The recipe asks for it, or the model's own settings of generation cannot be kept.
    """
    recipe = context.recipe
    if context.quantizes:
        raise UserError(
            f"Models that generate text cannot be quantised ({recipe.precision}).",
            "Choose --precision float32, float16 or bfloat16.",
        )
    if engines := [target for target in recipe.targets if target != GRAPHS]:
        raise UserError(
            f"There are no engines of models that generate text, and {', '.join(engines)} needs one.",
            "Build for --target onnxruntime.",
        )
    read_settings(context.source.folder)


def feeds(info: "BackboneInfo") -> dict[str, str]:
    """The output that feeds each cached input of the decoder (`PartEntry.feeds`)."""
    assert info.decoder_size is not None
    layers = info.decoder_size.num_layers
    return {
        past: f"{part}.{present}"
        for part, stack in ((DECODER, "decoder"), (ENCODER, "encoder"))
        for past, present in zip(past_names(layers, stack), present_names(layers, stack), strict=True)
    }


def verify_generation(context: BuildContext, variants: Sequence[VariantPlan]) -> None:
    """Check the decoder with each variant's encoder: scores along given tokens, and greedy search."""
    for plan in variants:
        depends_on = {
            **context.graph_input_hashes(plan),
            "encoder": context.staged.sha256(context.graph(plan)),
            "decoder": context.staged.sha256(context.traced[DECODER]),
            "backbone": context.backbone_key,
            "files": context.staged.steps["backbone"]["files"],
            "cases": context.recipe.verify.model_dump(mode="json"),
            "onnxruntime": versions(require_onnxruntime()),
            "made_by": context.code_fingerprint(*_GENERATED_BY),
        }
        make = functools.partial(_verify, context, plan)
        context.staged.step(f"generate/{plan.name}", depends_on, [], make)


def _verify(context: BuildContext, plan: VariantPlan) -> None:
    import torch

    from variator_export.verification.cases import make_cases
    from variator_export.verification.generation import (
        GeneratingVariant,
        check_generation,
        generation_cases,
    )

    info, recipe, folder = context.info, context.recipe, context.staged.folder
    assert info.decoder_size is not None
    cases = make_cases(
        context.encoder,
        info.spec.family.inputs,
        ratio=plan.ratio,
        vocab_size=info.config.vocab_size,
        max_length=info.max_length,
        texts=recipe.verify.texts,
        seed=recipe.verify.seed,
    )
    encoder, decoder = context.graph(plan), context.traced[DECODER]
    subject = GeneratingVariant(
        graph=decoder,
        encoder=open_for_verification(folder / encoder, {}, recipe.precision),
        decoder=open_for_verification(folder / decoder, {}, recipe.precision),
        size=info.decoder_size,
        settings=read_settings(folder),
        exact=context.eager(plan, context.backbone.to_dtype(torch.float64)),
        same_precision=context.eager(plan),
        precision=recipe.precision,
    )
    findings, partings = check_generation(subject, generation_cases(cases), recipe.verify.seed)
    refuse_failures(findings, plan.name, plan.ratio)
    write_json(
        folder / build_verification_report(f"{plan.name}_{DECODER}"),
        {
            "variant": plan.name,
            "precision": recipe.precision,
            "ran": how_it_runs(recipe.precision),
            "findings": [finding.as_dict() for finding in findings],
            "partings": [parting.as_dict() for parting in partings],
        },
    )
    if partings:
        context.staged.progress.note(
            f"{plan.name}: {len(partings)} generated texts part from eager PyTorch's at two tokens whose "
            "scores are equal within rounding."
        )
