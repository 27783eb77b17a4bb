"""Quality of plugins and of bundles: plugin folders are exported first, to measure what would be deployed."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from variator_export.building.recipe_build import build
from variator_export.bundle.manifest import is_bundle
from variator_export.bundle.variant_files import MODULE_CONFIG_NAME
from variator_export.core.assembly import parse_assembly
from variator_export.core.environment import require, require_export
from variator_export.core.errors import UserError
from variator_export.core.progress import Progress
from variator_export.data.examples import Examples
from variator_export.model.modular.files import load_module_config
from variator_export.model.modular.layout import whole_assembly
from variator_export.model.plugin_file import load_plugin_config
from variator_export.model.plugin_layout import CONFIG_NAME, BackboneIdentity
from variator_export.model.source import PACKAGE_PREFIX, resolve_source
from variator_export.quality.evaluation import EvaluationRuntime, Quality, Request, evaluate_bundle
from variator_export.quality.tasks.base import EvaluatedModel
from variator_export.recipe.assemblies import AssemblyRecipe, ModulesRecipe
from variator_export.recipe.recipe import BackboneRecipe, PluginRecipe, Recipe
from variator_export.recipe.recipes_folder import RECIPES_PREFIX
from variator_export.sessions import Bundle
from variator_export.text.tokenizer import TextEncoder


def evaluate(
    paths: str | Path | Sequence[str | Path],
    examples: Examples,
    *,
    task: str | None = None,
    backbone: str | None = None,
    architecture: str | None = None,
    label_words: Mapping[str, str] | None = None,
    decoder_prompt: str = "",
    runtimes: Sequence[EvaluationRuntime] = ("eager", "onnxruntime"),
    max_tokens: int | None = None,
    prompt_name: str | None = None,
    generation: Mapping[str, Any] | None = None,
    assemblies: Sequence[str] = (),
    output: Path | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Measure the quality of every variant.

    Args:
        paths: One bundle; or folders of plugins and of modules of one backbone, which are exported first.
        examples: Texts, with the pairs and targets that the task needs.
        task: The task (docs/evaluation.md). None means the first task that the model and the examples allow.
        backbone: The backbone's source. None means the source that the bundle or the plugins name.
        architecture: The class of transformers to load, for plugin folders. None means the class that
            config.json names.
        label_words: The word of each label, for plugin folders of a model that generates text and is to be a
            classifier. A bundle has its own.
        decoder_prompt: What its decoder reads before the label word.
        runtimes: Runtimes to run. With both, their outputs must agree except for rounding. The eager model of
            a quantised bundle is the float32 one, so there the outputs need not agree.
        max_tokens: Maximum length of a text. Longer texts are truncated. None means the model's limit.
        prompt_name: The model's prompt to put before each text. None means the model's default prompt.
        generation: Changes of the model's own settings of generation, such as `max_new_tokens`; for a model
            that generates text.
        assemblies: Assemblies of folders of modules, as specifications. Empty means one for each folder, with
            all of its modules.
        output: The folder of the bundle that plugin folders are exported to, a new one or one of the same
            backbone. `build` goes on from there. None means a temporary folder.
        progress: Receives progress reports.

    Raises:
        UserError: A path is neither a bundle nor a plugin folder, or the data does not fit the task.
        NumbersDisagreeError: The exported graph does not compute what eager PyTorch computes.
    """
    folders = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    for module in ("scipy", "sklearn"):
        require(module, "evaluate", "Evaluating quality")
    if "eager" in runtimes:
        require_export()
    elif backbone is not None and is_bundle(folders[0]):
        raise UserError(
            "A bundle's graphs contain their backbone, so --backbone would not be used.", "Leave it out."
        )
    progress = progress or Progress()
    request = Request(task, examples, max_tokens, prompt_name, generation or {})
    described = BackboneRecipe(
        source=backbone or "",
        architecture=architecture,
        label_words=None if label_words is None else dict(label_words),
        decoder_prompt=decoder_prompt,
    )
    with _bundle(folders, request, described, assemblies, output, progress) as bundle:
        return evaluate_bundle(bundle, request, backbone=backbone, runtimes=runtimes, progress=progress)


@contextmanager
def _bundle(
    paths: Sequence[Path],
    request: Request,
    backbone: BackboneRecipe,
    assemblies: Sequence[str],
    output: Path | None,
    progress: Progress,
) -> Iterator[Bundle]:
    if len(paths) == 1 and is_bundle(paths[0]):
        if output is not None:
            raise UserError(f"{paths[0]} is a bundle already.", "Leave out --output.")
        if assemblies:
            raise UserError(
                f"{paths[0]} is a bundle, which has its own assemblies.",
                "Leave out --assembly, or give the folders of modules.",
            )
        if backbone.label_words is not None or backbone.decoder_prompt:
            raise UserError(
                f"{paths[0]} is a bundle, which has its own label words.", "Leave out label words and prompt."
            )
        yield Bundle.load(paths[0])
        return
    for path in paths:
        if is_bundle(path):
            raise UserError(
                f"{path} is a bundle, and only one bundle can be evaluated at a time.", "Pass it alone."
            )
        if not any((path / name).is_file() for name in (CONFIG_NAME, MODULE_CONFIG_NAME)):
            raise UserError(
                f"{path} is neither a bundle nor a folder of a plugin or of modules.",
                "Pass one bundle (from `build`), or folders from `train` or `import`.",
            )
    modules = [path for path in paths if (path / MODULE_CONFIG_NAME).is_file()]
    paths = [path for path in paths if path not in modules]
    plugin_configs = [load_plugin_config(path) for path in paths]
    module_configs = [load_module_config(path) for path in modules]
    if assemblies and not modules:
        raise UserError("--assembly needs modules.", "Give their folders too.")
    identities = [config.backbone for config in plugin_configs]
    identities += [config.backbone for config in module_configs]
    backbone = backbone.model_copy(update={"source": backbone.source or _backbone_of(identities)})
    _check_backbone(backbone, request)
    plugins = tuple(PluginRecipe(source=str(path)) for path in paths)
    ratios = [config.ratio for config in plugin_configs]
    if len(set(ratios)) < len(ratios):
        plugins = tuple(
            PluginRecipe(source=str(path), name=f"{index + 1}-{path.resolve().name}")
            for index, path in enumerate(paths)
        )
    specs = assemblies or [str(whole_assembly(config)) for config in module_configs]
    recipe = Recipe(
        name="evaluated",
        backbone=backbone,
        plugins=plugins,
        modules=tuple(
            ModulesRecipe(source=str(path), name=f"modules-{index + 1}") for index, path in enumerate(modules)
        ),
        assemblies=tuple(AssemblyRecipe(spec=_checked(spec)) for spec in dict.fromkeys(specs)),
        speed=None,
        ratios=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        built = build(recipe, output or Path(folder) / "bundle", progress=progress)
        yield Bundle.load(built.bundle)


def _checked(spec: str) -> str:
    parse_assembly(spec)  # raises an error for people, where a recipe raises one of validation
    return spec


def _backbone_of(identities: Sequence[BackboneIdentity | None]) -> str:
    names = {identity.name if identity else None for identity in identities}
    name = next(iter(names))
    if len(names) > 1 or name is None or not name.startswith((PACKAGE_PREFIX, RECIPES_PREFIX)):
        raise UserError(
            f"The folders name {', '.join(sorted(str(n) for n in names))} as their backbone, but not where "
            "it is.",
            "Pass its location: --backbone SRC",
        )
    return name


def _check_backbone(backbone: BackboneRecipe, request: Request) -> None:
    """Refuse a backbone before the export if the task could not be measured after it."""
    require_export()
    from variator_export.model.backbone_info import read_backbone_info

    info = read_backbone_info(
        resolve_source(backbone.source),
        backbone.architecture,
        label_words=backbone.label_words,
        decoder_prompt=backbone.decoder_prompt,
    )
    config = info.config.to_dict()
    model = EvaluatedModel(backbone.source, info.spec.head.task, info.outputs, info.token_outputs, config)
    folder = info.source.folder
    request.prepare(model, TextEncoder(folder, info.max_length), folder)
