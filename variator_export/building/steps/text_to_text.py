"""The steps of a build for models that generate text: what is special about them."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from variator_export.building.context import VERIFIED_BY, BuildContext
from variator_export.building.variant_plan import VariantPlan
from variator_export.bundle.manifest import BACKBONE_WEIGHTS
from variator_export.bundle.reports import build_verification_report
from variator_export.core.axes import ENCODER_MASK, past_names, present_names
from variator_export.core.environment import require_onnxruntime, versions
from variator_export.core.errors import NumbersDisagreeError, UserError
from variator_export.core.json_file import write_json
from variator_export.core.parts import DECODER, ENCODER
from variator_export.core.precision import find_precision
from variator_export.generation.settings import read_settings
from variator_export.model.plugin_layout import null_plugin, stack_for_graph
from variator_export.verification.judging.compare import deviation
from variator_export.verification.judging.judge import refuse_failures
from variator_export.verification.verified_graph import how_it_runs, open_for_verification

if TYPE_CHECKING:
    from variator_export.model.backbone_info import BackboneInfo

_GENERATED_BY = (*VERIFIED_BY, "generation")
# The graph that Optimum runs for the first token.
FIRST_STEP = "decoder_model.onnx"
# How many epsilons of the precision two orders of the same products may differ by.
_SAME = 100


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


def make_first_step(context: BuildContext) -> None:
    """Write the decoder of the first token, and run it.

    Raises:
        NumbersDisagreeError: It does not compute what the decoder with an empty past computes.
    """
    staged = context.staged
    depends_on = {
        "decoder": staged.sha256(context.traced[DECODER]),
        "weights": staged.sha256(BACKBONE_WEIGHTS),
        "onnxruntime": versions(require_onnxruntime()),
        "made_by": context.code_fingerprint("graph", "building/steps/text_to_text.py"),
    }
    staged.step("first-step", depends_on, [FIRST_STEP], functools.partial(_make_first_step, context))


def _make_first_step(context: BuildContext) -> None:
    import onnx_ir as ir

    from variator_export.graph.first_step import HIDDEN_STATES, first_step
    from variator_export.graph.weights import external_tensors
    from variator_export.model.decoders.cross_attention import cross_projections
    from variator_export.verification.generation.decoder import RunnerDecoder

    folder, info, precision = context.staged.folder, context.info, context.recipe.precision
    assert info.decoder_size is not None
    model = first_step(
        ir.load(folder / context.traced[DECODER]),
        cross_projections(info.spec, context.backbone.model),
        external_tensors(folder, BACKBONE_WEIGHTS),
        info.decoder_size,
        info.size.hidden_size,
    )
    ir.save(model, folder / FIRST_STEP)
    mask = np.array([[1, 1, 1], [1, 1, 0]], np.int64)
    encoder = open_for_verification(folder / context.any_ratio, _null_plugin(context), precision)
    states = encoder.run({"input_ids": mask, "attention_mask": mask})
    tokens = np.full(len(mask), read_settings(folder).decoder_start_token_id, np.int64)
    decoder = open_for_verification(folder / context.traced[DECODER], {}, precision)
    expected = RunnerDecoder(decoder, info.decoder_size, mask, states).step(tokens)
    found = open_for_verification(folder / FIRST_STEP, {}, precision).run(
        {
            ENCODER_MASK: mask,
            "input_ids": tokens[:, None],
            HIDDEN_STATES: states["last_hidden_state"],
        }
    )
    error = deviation(found["logits"][:, -1], expected)
    if not error.finite or error.relative_frobenius > _SAME * find_precision(precision).epsilon:
        raise NumbersDisagreeError(
            f"{FIRST_STEP} differs from {context.traced[DECODER]} with an empty past: {error}.",
            "This is a bug in the export: please report it with the recipe.",
        )


def _null_plugin(context: BuildContext) -> dict[str, np.ndarray]:
    size = context.info.size
    return stack_for_graph(null_plugin(size.num_layers, size.hidden_size))


def verify_generation(context: BuildContext, variants: Sequence[VariantPlan]) -> None:
    """Check the decoder with each variant's encoder: scores along given tokens, and greedy search."""
    for plan in variants:
        depends_on = {
            **context.graph_input_hashes(plan),
            "encoder": context.staged.sha256(context.graph(plan)),
            "decoder": context.staged.sha256(context.decoder(plan)),
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
    from variator_export.verification.generation.checks import (
        GeneratingVariant,
        check_generation,
        generation_cases,
    )
    from variator_export.verification.generation.decoder import run_of_graphs

    info, recipe, folder = context.info, context.recipe, context.staged.folder
    cases = make_cases(
        context.encoder,
        info.spec.family.inputs,
        ratio=plan.ratio,
        vocab_size=info.config.vocab_size,
        max_length=info.max_length,
        texts=recipe.verify.texts,
        seed=recipe.verify.seed,
    )
    encoder, decoder = context.graph(plan), context.decoder(plan)
    size = context.decoder_size(plan)
    subject = GeneratingVariant(
        decoder=run_of_graphs(
            decoder,
            open_for_verification(folder / encoder, {}, recipe.precision),
            open_for_verification(folder / decoder, {}, recipe.precision),
            size,
        ),
        ratio=plan.ratio,
        vocab_size=size.vocab_size,
        settings=read_settings(folder),
        exact=context.eager(plan, context.backbone.to_dtype(torch.float64)),
        same_precision=context.eager(plan),
        precision=recipe.precision,
    )
    found = check_generation(subject, generation_cases(cases), recipe.verify.seed)
    refuse_failures(found.findings, plan.name, plan.ratio)
    write_json(
        folder / build_verification_report(f"{plan.name}_{DECODER}"),
        {
            "variant": plan.name,
            "precision": recipe.precision,
            "ran": how_it_runs(recipe.precision),
            "findings": [finding.as_dict() for finding in found.findings],
            "partings": [parting.as_dict() for parting in found.partings],
        },
    )
    if found.partings:
        context.staged.progress.note(
            f"{plan.name}: {len(found.partings)} generated texts part from eager PyTorch's at two tokens "
            "whose scores are equal within rounding."
        )
