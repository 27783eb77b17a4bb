"""Planning the assemblies of a build, and the modules that they are made of."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from variator_export.building.variant_plan import VariantPlan, is_reserved
from variator_export.bundle.branches import Branch, branches_of
from variator_export.bundle.files import BundleFiles
from variator_export.core.assembly import DECODER_STACK, ENCODER_STACK, Assembly, Span, Stack, parse_assembly
from variator_export.core.errors import UserError
from variator_export.core.hub import HUB_PREFIX, parse_hub_source
from variator_export.model.modular.files import (
    ResolvedModules,
    load_module_config,
    resolve_modules,
)
from variator_export.model.modular.layout import ModuleConfig, module_for
from variator_export.model.source import modules_folder
from variator_export.recipe.assemblies import VARIANT_NAME, AssemblyRecipe, ModulesRecipe
from variator_export.recipe.recipe import Recipe


@dataclass(frozen=True)
class ModulesPlan:
    """A folder of modules of a build.

    Attributes:
        name: Name of the folder in the bundle.
        recipe: The modules' entry in the recipe.
        config: The content of `module_config.json`.
        files: The files of the source; None for modules that exist only in the bundle.
    """

    name: str
    recipe: ModulesRecipe
    config: ModuleConfig
    files: ResolvedModules | None = None

    @property
    def folder(self) -> str:
        """The folder in the bundle."""
        return f"modules/{self.name}"


def select_modules(recipe: Recipe) -> tuple[ModulesPlan, ...]:
    """Read the modules that a recipe names.

    Raises:
        UserError: They cannot be read, or a name is not valid or is used twice.
    """
    found: list[ModulesPlan] = []
    for entry in recipe.modules:
        files = resolve_modules(modules_folder(entry.source))
        name = entry.name or _name_of(entry.source, files)
        if not re.fullmatch(VARIANT_NAME, name):
            raise UserError(
                f"{name!r} cannot name a folder of a bundle.",
                "Give the modules another name, of letters, digits, '-', '_' and '.': --module NAME=DIR",
            )
        if name in (plan.name for plan in found):
            raise UserError(
                f"Two folders of modules have the name {name}.",
                "Give each its own: --module NAME=DIR, or name: in the recipe.",
            )
        named = ModulesRecipe.model_validate({"name": name, "source": entry.source})
        found.append(ModulesPlan(name, named, files.config, files))
    return tuple(found)


def _name_of(source: str, files: ResolvedModules) -> str:
    """The name of modules that have none: that of their folder, or of their repository on the hub."""
    if source.startswith(HUB_PREFIX):
        found = parse_hub_source(source)
        return (found.subfolder or found.repo).rpartition("/")[2]
    return files.folder.resolve().name


def keep_modules(
    asked: Sequence[ModulesPlan], before: Recipe | None, old: BundleFiles | None
) -> tuple[ModulesPlan, ...]:
    """Add the modules that the bundle already has, besides those that are asked for.

    Raises:
        UserError: Two folders have a module for the same layers.
    """
    names = {plan.name for plan in asked}
    kept: list[ModulesPlan] = []
    if before is not None and old is not None:
        for entry in before.modules:
            if entry.name is not None and entry.name not in names:
                config = load_module_config(old.path / "modules" / entry.name)
                kept.append(ModulesPlan(entry.name, entry, config))
    plans = tuple(sorted((*asked, *kept), key=lambda plan: plan.name))
    seen: dict[tuple[str, Span], str] = {}
    for plan in plans:
        for group in plan.config.modules:
            other = seen.setdefault((plan.config.stack, group.span), plan.name)
            if other != plan.name:
                raise UserError(
                    f"Two folders have a module for the {plan.config.stack}'s layers {group.span}: {other} "
                    f"and {plan.name}.",
                    f"Replace the first by giving the second its name (--module {other}=DIR), or build into "
                    "another folder.",
                )
    return plans


def keep_assemblies(asked: Sequence[AssemblyRecipe], before: Recipe | None) -> tuple[AssemblyRecipe, ...]:
    """Give every assembly a name, and add those that the bundle already has.

    Raises:
        UserError: A name is used twice.
    """
    named = [_named(entry) for entry in asked]
    names = [str(entry.name) for entry in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"Two assemblies have the name {name}.",
                "Leave one out, or give each a name: --assembly NAME=SPEC, or name: in the recipe.",
            )
    kept = [] if before is None else [entry for entry in before.assemblies if entry.name not in names]
    return tuple(sorted((*named, *kept), key=lambda entry: str(entry.name)))


def _named(entry: AssemblyRecipe) -> AssemblyRecipe:
    if entry.name is not None:
        return entry
    assembly, ratio = parse_assembly(entry.spec)
    name = assembly.name + (f"_ratio-{ratio}" if ratio not in (None, 1) else "")
    return entry.model_copy(update={"name": name})


def plan_assemblies(
    assemblies: Sequence[AssemblyRecipe],
    plans: Sequence[VariantPlan],
    modules: Sequence[ModulesPlan],
) -> tuple[list[VariantPlan], tuple[AssemblyRecipe, ...]]:
    """Plan a variant for each assembly.

    Args:
        assemblies: The assemblies, named.
        plans: The variants of the original layers: the baseline and the plugins.
        modules: The modules.

    Returns:
        The variants, and the assemblies with the names of their plugins.

    Raises:
        UserError: An assembly is the original, does not add up, or lacks a module or a plugin; or a name
            belongs to another variant.
    """
    taken = {plan.name for plan in plans}
    found, entries = [], []
    for entry in assemblies:
        assert entry.name is not None
        if entry.name in taken or is_reserved(entry.name):
            raise UserError(
                f"The assembly {entry.spec} cannot have the name {entry.name}, which means another variant "
                "or file.",
                "Choose another name: --assembly NAME=SPEC, or name: in the recipe.",
            )
        assembly, ratio = parse_assembly(entry.spec)
        if assembly.is_original:
            raise UserError(
                f"The assembly {entry.spec} has only original layers: it is the backbone itself.",
                "Leave it out; the backbone is always built, and so is every ratio that has a plugin.",
            )
        used = _used(assembly, modules)
        plugin = _plugin(entry, plans, ratio)
        entries.append(entry.model_copy(update={"plugin": None if plugin is None else plugin.name}))
        found.append(
            VariantPlan(
                entry.name,
                1 if plugin is None else plugin.ratio,
                None if plugin is None else plugin.plugin,
                assembly=assembly,
                modules=tuple(plan.name for plan in modules if plan.name in used),
            )
        )
    return found, tuple(entries)


def _used(assembly: Assembly, modules: Sequence[ModulesPlan]) -> set[str]:
    """Names of the folders whose modules an assembly takes."""
    configs = [plan.config for plan in modules]
    found = set()
    for stack in (ENCODER_STACK, DECODER_STACK):
        listed = assembly.granularities(stack)
        # A stack without modules has the layers that the assembly says, until the backbone is read.
        lengths = [config.num_layers for config in configs if config.stack == stack] or [sum(listed)]
        found |= {
            modules[module_for(stack, span, configs)[0]].name
            for span in (assembly.spans(stack, lengths[0]) if listed else ())
            if span.granularity > 1
        }
    return found


def check_assemblies(plans: Sequence[VariantPlan], stack_layers: Mapping[Stack, int]) -> None:
    """Check assemblies against the backbone.

    Args:
        plans: The variants.
        stack_layers: Layers of the backbone's stacks, by stack.

    Raises:
        UserError: An assembly names a stack that the backbone does not have, or does not add up.
    """
    for assembly in (plan.assembly for plan in plans if plan.assembly is not None):
        for stack in (ENCODER_STACK, DECODER_STACK):
            if stack in stack_layers:
                assembly.spans(stack, stack_layers[stack])
            elif assembly.granularities(stack):
                raise UserError(
                    f"The assembly {assembly} names the {stack}, which the backbone does not have.",
                    "Leave that part out.",
                )


def branches_of_plan(
    plans: Sequence[VariantPlan], modules: Sequence[ModulesPlan], stack_layers: Mapping[Stack, int]
) -> tuple[Branch, ...]:
    """The branches of the graph that runs every assembly; none without assemblies.

    Args:
        plans: The variants.
        modules: The modules.
        stack_layers: Layers of the backbone's stacks, by stack.
    """
    configs = [plan.config for plan in modules]
    found: list[Branch] = []
    for stack, num_layers in stack_layers.items():
        used = [
            {
                span: modules[module_for(stack, span, configs)[0]].name
                for span in plan.assembly.spans(stack, num_layers)
                if span.granularity > 1
            }
            for plan in plans
            if plan.assembly is not None
        ]
        found += branches_of(stack, num_layers, used)
    return tuple(found)


def _plugin(entry: AssemblyRecipe, plans: Sequence[VariantPlan], ratio: int | None) -> VariantPlan | None:
    """The plan of the plugin that an assembly takes; None if it takes none."""
    if ratio in (None, 1):
        return None
    found = [plan for plan in plans if plan.ratio == ratio and entry.plugin in (None, plan.name)]
    if len(found) != 1:
        there = ", ".join(f"{plan.name} (ratio {plan.ratio})" for plan in plans if plan.plugin is not None)
        raise UserError(
            f"The assembly {entry.spec} asks for the plugin of ratio {ratio}; there are "
            f"{there or 'no plugins'}.",
            "Give a plugin of that ratio (--plugin DIR), name one of several (plugin: in the recipe's "
            "assembly), or choose other assemblies.",
        )
    return found[0]
