"""The steps of a build up to the verified graphs. Each step declares everything its result depends on."""

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variator_export.building.context import (
    BOUND_BY,
    INITIALISED_BY,
    TEXT_CHECKED_BY,
    TRACED_BY,
    VERIFIED_BY,
    BuildContext,
)
from variator_export.building.variant_plan import VariantPlan
from variator_export.bundle.manifest import BACKBONE_WEIGHTS, CALIBRATION, LEAST_SHARE, PrecisionProof
from variator_export.bundle.reports import build_verification_report
from variator_export.core.environment import require_onnxruntime, versions
from variator_export.core.errors import NumbersDisagreeError, UserError
from variator_export.core.hashing import sha256_file
from variator_export.core.json_file import read_json_object, write_json
from variator_export.core.precision import FLOAT16, find_precision
from variator_export.inference import TextModel
from variator_export.model.methods import METHODS
from variator_export.model.plugin_file import (
    check_plugin_fits,
    load_plugin,
    plugin_files,
    save_plugin,
)
from variator_export.model.plugin_layout import CONFIG_NAME, TENSORS_NAME
from variator_export.text.tokenizer import TextEncoder
from variator_export.verification.judging.error_budget import MULTIPLE, quantization_share
from variator_export.verification.text_check import DISTRIBUTIONS, check_texts
from variator_export.verification.verified_graph import how_it_runs, open_for_verification

if TYPE_CHECKING:
    from variator_export.bundle.manifest import BackboneEntry
    from variator_export.engines.base import Arrays
    from variator_export.verification.cases import Case
    from variator_export.verification.judging.expected import Expected
    from variator_export.verification.quantized.losses import QuantizationLoss


def copy_backbone_files(context: BuildContext) -> None:
    """Copy everything but the weights, so that sentence-transformers and Optimum open the bundle."""
    files = context.backbone_files

    def make() -> None:
        for name, path in files.items():
            (context.staged.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, context.staged.folder / name)

    copied = {name: sha256_file(path) for name, path in files.items()}
    context.staged.step("backbone", context.backbone_key | {"files": copied}, list(files), make)


def make_plugin(context: BuildContext, plan: VariantPlan) -> None:
    """Copy a plugin into the bundle, or initialise a new plugin there."""
    assert plan.plugin is not None
    staged, recipe = context.staged, plan.plugin
    name = f"plugin/{plan.name}"
    folder = plan.plugin_folder
    assert folder is not None
    target = staged.folder / folder
    if plan.kept and staged.old is not None:
        # The copy in the bundle is now authoritative: the plugin's source may no longer exist.
        depends_on = staged.old.manifest.steps.get(name, {})
    elif plan.files is not None:
        depends_on = {"sha256": plan.files.sha256}
    else:
        assert recipe.initialise is not None
        depends_on = {
            "initialise": recipe.initialise.model_dump(),
            "ratio": plan.ratio,
            "backbone": context.source.label,
            "config": context.backbone_key["files"]["config.json"],
            "weights_sha256": context.source.weights_sha256,
            "made_by": context.code_fingerprint(*INITIALISED_BY),
        }

    def make() -> None:
        if plan.files is not None:
            plugin = load_plugin(plan.files.folder)
            check_plugin_fits(plugin.config, str(recipe.source), context.host)
            for path in plugin_files(plan.files.folder):
                shutil.copyfile(path, target / path.name)
        else:
            _initialise(context, plan, target)

    staged.step(name, depends_on, [f"{folder}/{CONFIG_NAME}", f"{folder}/{TENSORS_NAME}"], make)


def _initialise(context: BuildContext, plan: VariantPlan, target: Path) -> None:
    from variator_export.model.plugin import initialise_plugin

    assert plan.plugin is not None
    options = plan.plugin.initialise
    assert options is not None
    size, limit = context.info.size, context.info.max_length
    if limit is not None and plan.ratio > limit:
        raise UserError(
            f"The ratio {plan.ratio} exceeds the {limit} tokens that the backbone accepts.",
            "Choose a smaller ratio.",
        )
    plugin = initialise_plugin(
        plan.ratio,
        size.hidden_size,
        size.num_layers,
        bottleneck_size=options.bottleneck_size,
        masking=options.masking,
        seed=options.seed,
        backbone=context.info.identity,
    )
    save_plugin(plugin, target)


def trace_backbone(context: BuildContext, variants: list[VariantPlan]) -> None:
    """Trace the backbone into the any-ratio graph and the weights."""
    staged = context.staged

    def make() -> None:
        import onnx_ir as ir

        from variator_export.graph.trace import trace
        from variator_export.verification.cases import encode_texts

        info = context.info
        for plan in variants:  # reused plugins included, because the backbone may have changed
            if plan.plugin is not None:
                check_plugin_fits(context.plugin_config(plan), plan.plugin.source or plan.name, context.host)
        encode_texts(  # rejects texts that cannot be verified before the slow trace starts
            context.encoder,
            info.spec.family.inputs,
            context.recipe.verify.texts,
            vocab_size=info.config.vocab_size,
            max_length=info.max_length,
        )
        opset = context.recipe.graphs.opset
        assert opset is not None
        for part, model in trace(context.backbone, staged.folder, BACKBONE_WEIGHTS, opset).items():
            ir.save(model, staged.folder / context.traced[part])

    depends_on: dict[str, Any] = {
        "backbone": context.backbone_key,
        "precision": context.recipe.precision,
        "opset": context.recipe.graphs.opset,
        "pad_token_id": context.encoder.pad_token_id,
        "made_by": context.code_fingerprint(*TRACED_BY),
    }
    if context.quantizes:
        depends_on["float32_modules"] = list(context.recipe.quantization.float32_modules)
    if context.calibration is not None:
        depends_on["calibration"] = staged.sha256(CALIBRATION)
    staged.step("trace", depends_on, [*context.traced.values(), BACKBONE_WEIGHTS], make)


def bind_variant(context: BuildContext, plan: VariantPlan) -> None:
    """Bind a variant's plugin into the any-ratio graph, which yields the graph of one ratio."""
    staged = context.staged
    output = context.graph(plan)

    def make() -> None:
        import onnx_ir as ir

        method = METHODS.find(plan.method)
        model = method.bind(staged.folder / context.any_ratio, context.files(plan), context.info)
        ir.save(model, staged.folder / output)

    depends_on = {**context.graph_input_hashes(plan), "made_by": context.code_fingerprint(*BOUND_BY)}
    staged.step(f"bind/{plan.name}", depends_on, [output], make)


def precision_proof(context: BuildContext, plan: VariantPlan) -> PrecisionProof:
    """Measure the share of a variant's graph that computes in the recipe's precision.

    Raises:
        NumbersDisagreeError: Less than 95 % of the multiply-accumulates outside modules declared as float32
            are in the recipe's precision.
    """
    staged, name = context.staged, context.graph(plan)
    if staged.old is not None:
        for variant in staged.old.manifest.variants:
            files = staged.old.manifest.files
            if name in variant.graphs.values() and files[name].sha256 == staged.sha256(name):
                return variant.precision_proof
    from variator_export.graph.macs import precision_share

    precision = context.recipe.precision
    family = context.info.spec.family
    kept = (*family.float32_modules, *context.recipe.quantization.float32_modules)
    share = precision_share(staged.folder / name, precision, kept, plan.ratio, family.stack)
    if share.macs < LEAST_SHARE:
        raise NumbersDisagreeError(
            f"{plan.name}: {share.macs:.1%} of the multiply-accumulates are in {precision}, not counting "
            f"modules that stay in float32; at least {LEAST_SHARE:.0%} are required.",
            "This is a bug in the export: please report it with the recipe, or use --precision float32.",
        )
    is_original = plan.plugin is None and plan.assembly is None
    if is_original and precision == FLOAT16.name and family.float32_modules:
        stays = sum(share.float32_modules.values())
        staged.progress.note(
            f"{', '.join(family.float32_modules)} stays in float32, because its values exceed float16: "
            f"{stays:.0%} of the products, which a GPU computes several times slower. --precision bfloat16 "
            "has none of them; engine.tf32 in the recipe makes them faster."
        )
    return PrecisionProof(macs=round(share.macs, 6), float32_modules=share.float32_modules)


def verify_variant(context: BuildContext, plan: VariantPlan) -> None:
    """Run all checks on both graphs of a variant, store the reference and write the report."""
    staged, recipe = context.staged, context.recipe
    depends_on = {
        **context.graph_input_hashes(plan),
        "graph": staged.sha256(context.graph(plan)),
        "session_graph": staged.sha256(context.session_graph),
        "backbone": context.backbone_key,
        "cases": recipe.verify.model_dump(mode="json"),
        "allowed": MULTIPLE,
        "onnxruntime": versions(require_onnxruntime()),
        "made_by": context.code_fingerprint(*VERIFIED_BY),
    }
    if context.quantizes:
        depends_on["quantization"] = recipe.quantization.model_dump(mode="json")
    output = reference_path(plan)
    staged.step(f"verify/{plan.name}", depends_on, [output], lambda: _verify(context, plan, output))


def check_texts_of_baseline(context: BuildContext, plan: VariantPlan, backbone: "BackboneEntry") -> None:
    """Compare the uncompressed model with the library of its users, from text to result."""
    depends_on = {
        "graph": context.staged.sha256(f"{plan.name}.onnx"),
        "weights": context.staged.sha256(BACKBONE_WEIGHTS),
        "files": context.staged.steps["backbone"]["files"],
        "texts": list(context.recipe.verify.texts),
        "versions": versions(*DISTRIBUTIONS, require_onnxruntime()),
        "made_by": context.code_fingerprint(*TEXT_CHECKED_BY),
    }

    def make() -> None:
        recipe, folder = context.recipe, context.staged.folder
        runner = open_for_verification(folder / f"{plan.name}.onnx", {}, recipe.precision)
        config = read_json_object(folder / "config.json", "Restore it from its source.")
        encoder = TextEncoder(folder, backbone.max_length)
        model = TextModel(
            lambda inputs, _: runner.run(inputs), encoder, backbone, backbone.with_labels(config)
        )
        check_texts(
            model,
            context.source.folder,
            recipe.verify.texts,
            recipe.precision,
            quantize=context.quantizer,
        )

    context.staged.step("verify/texts", depends_on, [], make)


def reference_path(plan: VariantPlan) -> str:
    """Return the file of a variant's stored inputs and eager outputs, relative to the bundle."""
    return f"reference/{plan.name}.safetensors"


def _verify(context: BuildContext, plan: VariantPlan, output: str) -> None:
    import torch

    from variator_export.verification.cases import make_cases
    from variator_export.verification.checks import CheckedVariant, check_variant
    from variator_export.verification.judging.judge import refuse_failures
    from variator_export.verification.quantized.variant import QuantizedVariant, check_quantization
    from variator_export.verification.reference import EAGER, save_reference

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
    subject = CheckedVariant(
        plan.ratio,
        context.encoder.pad_token_id,
        info.token_outputs,
        info.max_length,
        padding_states_vary=info.spec.family.padding_states_vary,
        masking=None if plan.plugin is None else context.plugin_config(plan).masking,
        quantized=quantization_share(recipe.precision) is not None,
    )
    with context.staged.progress.bar(
        f"verify {plan.name}", len(cases) * 3 + 2 + context.quantizes
    ) as advance:
        # Reference first, then the sessions, so that the float64 copy and the sessions are never in memory
        # at the same time.
        reference = _reference(context, plan, cases, advance)
        graphs: dict[str, Arrays] = {
            context.graph(plan): {},
            **{name: context.graph_inputs(plan, name) for name in context.shared_graphs(plan)},
        }
        openers = {
            name: functools.partial(
                open_for_verification,
                folder / name,
                extra,
                recipe.precision,
                context.shared_outputs(plan, name),
            )
            for name, extra in graphs.items()
        }
        findings, _ = check_variant(openers, reference, subject, progress=advance)
        losses: list[QuantizationLoss] = []
        if context.quantizes:
            quantized = QuantizedVariant(
                name=plan.name,
                folder=folder,
                graphs={name: graphs[name] for name in graphs if name not in context.branched},
                precision=recipe.precision,
                exact=context.eager(plan, context.backbone.to_dtype(torch.float64)),
                rounded=context.eager(plan),
                float32=context.eager(plan, context.unquantized),
                token_outputs=info.token_outputs,
                limits=recipe.quantization,
            )
            more, losses = check_quantization(quantized, cases, advance)
            findings += more
    if subject.reads_varying_padding:
        context.staged.progress.note(
            f"{plan.name}: the outputs depend on the amount of padding in a batch, because the plugin reads "
            f"the hidden states of padding (masking: none), which in {info.spec.family.name} depend on it. A "
            "plugin with masking: exclude-padding does not."
        )
    refuse_failures(findings, plan.name, plan.ratio)
    _refuse_losses(context, plan, losses, cases[0])
    save_reference(reference, folder / output)
    write_json(
        folder / build_verification_report(plan.name),
        {
            "variant": plan.name,
            "precision": recipe.precision,
            "ran": how_it_runs(recipe.precision),
            "reference": EAGER,
            "findings": [finding.as_dict() for finding in findings],
            "quantization": [loss.as_dict() for loss in losses],
        },
    )


def _refuse_losses(
    context: BuildContext, plan: VariantPlan, losses: "Sequence[QuantizationLoss]", case: "Case"
) -> None:
    """End a build whose quantisation loses more than the recipe allows on the case of the losses.

    Raises:
        NumbersDisagreeError: A loss is outside its limit.
    """
    from variator_export.verification.quantized.losses import refuse_losses

    quantization, precision = context.recipe.quantization, find_precision(context.recipe.precision)

    def run(kept: Sequence[str] | None) -> "Arrays":
        backbone = context.unquantized
        if kept is not None:
            kept = (*quantization.float32_modules, *kept)
            backbone = backbone.in_precision(precision, kept, context.calibration)
        return context.eager(plan, backbone).run(case.inputs)

    # An assembly's modules are quantised already, so no part of them can be tried in float32.
    modules = () if plan.assembly is not None else context.unquantized.quantizable_modules
    refuse_losses(losses, run, modules)


def _reference(
    context: BuildContext, plan: VariantPlan, cases: "Sequence[Case]", progress: Callable[[], None]
) -> "list[Expected]":
    import torch

    from variator_export.verification.reference import eager_reference

    exact, precision = context.eager(plan, context.backbone.to_dtype(torch.float64)), context.recipe.precision
    share = quantization_share(precision)
    other = context.eager(plan, context.unquantized if share is not None else context.backbone)
    return eager_reference(exact, other, cases, precision, progress, share=share)
