"""The steps of a build that copy modules and assemble graphs."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from variator_export.building.context import BOUND_BY, TRACED_BY, BuildContext
from variator_export.building.plan_modular import ModulesPlan, branches_of_plan, check_assemblies
from variator_export.building.variant_plan import VariantPlan
from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.manifest import BACKBONE_WEIGHTS, ModulesEntry
from variator_export.bundle.variant import decoder_name
from variator_export.bundle.variant_files import (
    MODULE_CONFIG_NAME,
    MODULE_TENSORS_NAME,
    QUANTIZED_MODULES_NAME,
)
from variator_export.core.assembly import DECODER_STACK
from variator_export.core.errors import UserError
from variator_export.core.parts import DECODER
from variator_export.core.precision import find_precision
from variator_export.model.modular.files import check_modules_fit

if TYPE_CHECKING:
    from variator_export.model.modular.weights import ModuleSet


def check_plan(
    context: BuildContext, variants: Sequence[VariantPlan], modules: Sequence[ModulesPlan]
) -> None:
    """Check modules and assemblies against the backbone and the precision, before anything slow starts.

    Raises:
        UserError: They do not fit.
    """
    if not modules and all(plan.assembly is None for plan in variants):
        return
    precision = find_precision(context.recipe.precision)
    if precision.needs_calibration:
        raise UserError(
            f"Modules have no constant scales of activations, which {precision.name} needs.",
            "Choose --precision int8, whose scales are computed for each token, or a floating-point type.",
        )
    from variator_export.model.modular.assembled import refuse_assembly

    refuse_assembly(context.info)
    layers = context.info.stack_layers
    for plan in modules:
        check_modules_fit(plan.config, plan.recipe.source, context.host, layers)
    check_assemblies(variants, layers)
    default = next(plan for plan in variants if plan.name == context.recipe.graphs.default_variant)
    if decoder_name(default.assembly) != ANY_RATIO:
        raise UserError(
            f"The default variant is {default.name}, whose decoder has modules. Programs that open the "
            "bundle as a model of Optimum would run its encoder with the original decoder.",
            "Choose a variant with the original decoder: --default-variant NAME.",
        )
    context.branches = branches_of_plan(variants, modules, layers)


def copy_modules(context: BuildContext, plan: ModulesPlan) -> None:
    """Put modules into the bundle, in its precision."""
    staged = context.staged
    name = f"modules/{plan.name}"
    outputs = [f"{plan.folder}/{file}" for file in (MODULE_CONFIG_NAME, MODULE_TENSORS_NAME)]
    if context.quantizes:
        outputs.append(f"{plan.folder}/{QUANTIZED_MODULES_NAME}")
    before = {} if staged.old is None else staged.old.manifest.steps.get(name, {})
    depends_on = {
        # Without files, the copy in the bundle is authoritative: its source may no longer exist.
        "sha256": before.get("sha256") if plan.files is None else plan.files.sha256,
        "precision": context.recipe.precision,
        "backbone": context.backbone_key,
        "made_by": context.code_fingerprint(*TRACED_BY),
    }
    if context.quantizes:
        depends_on["float32_modules"] = list(context.recipe.quantization.float32_modules)
    staged.step(name, depends_on, outputs, functools.partial(_copy, context, plan))


def _copy(context: BuildContext, plan: ModulesPlan) -> None:
    from variator_export.model.modular.assembled import in_precision
    from variator_export.model.modular.weights import load_bundled, load_modules, write_config
    from variator_export.model.weights_file import write_weights

    old, target = context.staged.old, context.staged.folder / plan.folder
    if plan.files is not None:
        modules: ModuleSet = load_modules(plan.files.folder)
    else:
        assert old is not None
        for file in (MODULE_CONFIG_NAME, MODULE_TENSORS_NAME):
            old.file(f"{plan.folder}/{file}")
        modules = load_bundled(old.path / plan.folder, quantized=False)
    precision = find_precision(context.recipe.precision)
    float32 = context.in_float32
    unquantized = in_precision(float32, modules, find_precision(precision.unquantized))
    write_weights(unquantized, target / MODULE_TENSORS_NAME)
    write_config(modules.config, target)
    if precision.quantizes:
        kept = context.recipe.quantization.float32_modules
        write_weights(in_precision(float32, modules, precision, kept), target / QUANTIZED_MODULES_NAME)


def assemble_graphs(context: BuildContext, modules: Sequence[ModulesPlan]) -> None:
    """Make the graph that runs every assembly, if there are any."""
    if not context.branches:
        return
    staged, output = context.staged, context.session_graph
    used = {branch.modules for branch in context.branches}
    folders = tuple(plan.folder for plan in modules if plan.name in used)
    depends_on: dict[str, Any] = {
        "branches": [branch.model_dump() for branch in context.branches],
        "any_ratio": staged.sha256(context.any_ratio),
        "weights": staged.sha256(BACKBONE_WEIGHTS),
        "modules": context.module_hashes(folders),
        "made_by": context.code_fingerprint(*TRACED_BY),
    }

    def make() -> None:
        import onnx_ir as ir

        from variator_export.graph.assemblies.variant import assemble_any

        model = assemble_any(staged.folder / context.any_ratio, context.branches, folders, context.info)
        ir.save(model, staged.folder / output)

    staged.step("assemble", depends_on, [output], make)


def assemble_decoders(
    context: BuildContext, variants: Sequence[VariantPlan], modules: Sequence[ModulesPlan]
) -> None:
    """Make the decoders that have modules, one for all variants whose decoder has the same layers."""
    staged, original = context.staged, context.traced[DECODER]
    of_decoder = {plan.name for plan in modules if plan.config.stack == DECODER_STACK}
    first = {context.decoder(plan): plan for plan in reversed(variants)}
    for output, plan in sorted(first.items()):
        if output == original:
            continue
        assert plan.assembly is not None
        decoder = dataclasses.replace(
            plan,
            assembly=plan.assembly.of_stack(DECODER_STACK),
            modules=tuple(name for name in plan.modules if name in of_decoder),
        )
        depends_on: dict[str, Any] = {
            "assembly": str(decoder.assembly),
            "decoder": staged.sha256(original),
            "weights": staged.sha256(BACKBONE_WEIGHTS),
            "modules": context.module_hashes(decoder.module_folders),
            "made_by": context.code_fingerprint(*BOUND_BY),
        }

        def make(output: str = output, decoder: VariantPlan = decoder) -> None:
            import onnx_ir as ir

            from variator_export.graph.assemblies.variant import assemble_decoder

            model = assemble_decoder(staged.folder / original, context.files(decoder), context.info)
            ir.save(model, staged.folder / output)

        staged.step(f"assemble/{decoder_name(decoder.assembly)}", depends_on, [output], make)


def modules_entries(context: BuildContext, modules: Sequence[ModulesPlan]) -> dict[str, ModulesEntry]:
    """The manifest's entries of modules, by name."""
    return {
        plan.name: ModulesEntry(
            folder=plan.folder,
            source=plan.recipe.source,
            sha256=context.staged.sha256(f"{plan.folder}/{MODULE_TENSORS_NAME}"),
            stack=plan.config.stack,
            granularity=plan.config.granularity,
            groups=tuple((group.first, group.last, group.like) for group in plan.config.modules),
            trained=plan.config.training is not None,
        )
        for plan in modules
    }
