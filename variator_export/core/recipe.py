"""Recipes: what to build, as a YAML file. Typed, validated, unknown keys refused."""

import os
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from variator_export.core.errors import UserError
from variator_export.core.validation import describe_validation_error

DEFAULT_RECIPE = "minilm"
# Before the path of a plugin that comes with the package's recipes.
RECIPES_PREFIX = "recipes:"
TARGETS = ("onnxruntime", "tensorrt-rtx", "tensorrt")
Target = Literal["onnxruntime", "tensorrt-rtx", "tensorrt"]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")]
VariantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Range = tuple[
    Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
]  # min, opt, max


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BackboneRecipe(_Part):
    """The pretrained transformer."""

    source: str
    """A folder, or `package:DISTRIBUTION/PATH`."""
    sha256: Sha256 | None = None
    """The sha256 that its weights must have; None: any."""
    task: str | None = None
    """What the model is to do, as Optimum names it (`feature-extraction`), which chooses the class of its
    family; None: that of the class which config.json names."""
    architecture: str | None = None
    """The transformers class to load, instead of a task."""

    @model_validator(mode="after")
    def _one_choice(self) -> "BackboneRecipe":
        if self.task is not None and self.architecture is not None:
            raise ValueError("give task or architecture, not both")
        return self


class Initialise(_Part):
    """An untrained plugin, made by the paper's initialisation."""

    bottleneck_size: int = Field(default=64, ge=1)
    """Width of the decompression layer's bottleneck."""
    masking: Literal["none", "exclude-padding"] = "none"
    """`none` as in the paper's code, or `exclude-padding`."""
    seed: int = Field(default=0, ge=0)
    """Of the random generator."""


class PluginRecipe(_Part):
    """One compression plugin: read from a folder, or made by initialisation."""

    name: VariantName | None = None
    """The variant's name; None: `ratio-K`."""
    ratio: int | None = Field(default=None, ge=2)
    """Its ratio; may be left out for a folder, which says it itself."""
    source: str | None = None
    """A folder with `plugin_config.json` and `plugin.safetensors` (`plugin_folder`)."""
    initialise: Initialise | None = None
    """How to make one instead."""

    @model_validator(mode="after")
    def _one_origin(self) -> "PluginRecipe":
        if (self.source is None) == (self.initialise is None):
            raise ValueError("a plugin has either a source or initialise")
        if self.initialise is not None and self.ratio is None:
            raise ValueError("a plugin with initialise needs a ratio")
        return self


class VerifyRecipe(_Part):
    """What graphs are verified on, besides a grid of shapes."""

    texts: tuple[str, ...] = ()
    """Real texts; empty: a few that come with the package."""
    seed: int = 0
    """Of the random token ids of the grid."""


class SpeedRecipe(_Part):
    """The measurement at the end of a build."""

    batch_size: int = Field(default=8, ge=1)
    """Rows."""
    sequence_length: int = Field(default=128, ge=1)
    """Tokens in each row."""
    rounds: int = Field(default=5, ge=2)
    """How often the subjects take turns."""
    block_seconds: float = Field(default=0.4, gt=0)
    """How long one subject runs in a turn, warm-up apart."""


class EngineRecipe(_Part):
    """The optimization profile of an engine, as (min, opt, max)."""

    batch_size: Range = (1, 8, 32)
    """Rows."""
    sequence_length: Range = (1, 128, 512)
    """Tokens."""

    @model_validator(mode="after")
    def _ordered(self) -> "EngineRecipe":
        for name in ("batch_size", "sequence_length"):
            low, opt, high = getattr(self, name)
            if not low <= opt <= high:
                raise ValueError(f"{name} must be min <= opt <= max, and is {low}, {opt}, {high}")
        return self


class Recipe(_Part):
    """Everything that decides what a build makes."""

    name: VariantName
    """Names the bundle's default folder, artifacts/NAME."""
    backbone: BackboneRecipe
    """The pretrained transformer."""
    plugins: tuple[PluginRecipe, ...] = ()
    """The compression plugins there are."""
    ratios: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Those to build; None: all that the plugins have. The baseline, ratio 1, always comes along."""
    precision: Literal["float32"] = "float32"
    """Of the graphs."""
    targets: tuple[Target, ...] = ("onnxruntime",)
    """What to build engines for. Graphs run on onnxruntime as they are."""
    verify: VerifyRecipe = VerifyRecipe()
    """What graphs are verified on."""
    speed: SpeedRecipe | None = SpeedRecipe()
    """The measurement at the end; None: none."""
    engine: EngineRecipe = EngineRecipe()
    """The optimization profile of engines."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose keys come once; PyYAML takes the last of several without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that comes twice."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} comes twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A YAML file, or the name of a recipe that comes with the package.

    Raises:
        UserError: It does not exist, is no YAML, or does not validate.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"The recipe {path} cannot be read: {error}.",
                f"Give a YAML file, or one of: {', '.join(shipped_recipes())}.",
            ) from error
        relative_to: Path | None = path.parent
    else:
        if str(recipe) not in shipped_recipes():
            raise UserError(
                f"There is no recipe {recipe}.",
                f"Give a YAML file, or one of: {', '.join(shipped_recipes())}.",
            )
        text = (_shipped() / f"{recipe}.yaml").read_text(encoding="utf-8")
        relative_to = None
    try:
        content = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"The recipe {recipe} is not valid YAML: {error}", "Correct it there.") from error
    return _relative(parse_recipe(content, str(recipe)), relative_to)


def parse_recipe(content: Any, name: str) -> Recipe:
    """Validate the content of a recipe.

    Raises:
        UserError: It does not validate; names the key, what was found and the nearest known key.
    """
    if not isinstance(content, dict):
        raise UserError(f"The recipe {name} is no mapping.", "Start from recipes/minilm.yaml.")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(
            f"The recipe {name} does not validate: {describe_validation_error(error, Recipe)}",
            "docs/recipes.md describes every key.",
        ) from error


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, by which editors complete and check one while it is written."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(
        re.sub(r"\.yaml$", "", entry.name) for entry in _shipped().iterdir() if entry.name.endswith(".yaml")
    )


def plugin_folder(source: str) -> Path:
    """The folder of a plugin: `recipes:PATH` for one that comes with the package, else a path.

    Raises:
        UserError: The package has no such plugin.
    """
    if not source.startswith(RECIPES_PREFIX):
        return Path(source).expanduser()
    # A folder on disk: the package says that it cannot run from an archive (pyproject.toml, zip-safe).
    recipes = Path(str(_shipped()))
    name = source.removeprefix(RECIPES_PREFIX)
    there = sorted(
        path.parent.relative_to(recipes).as_posix() for path in recipes.glob("*/*/plugin.safetensors")
    )
    if name not in there:
        raise UserError(
            f"The package has no plugin {source}.",
            f"It has: {', '.join(RECIPES_PREFIX + other for other in there) or 'none'}.",
        )
    return recipes / name


def _shipped() -> Any:
    return resources.files("variator_export.recipes")


def _relative(recipe: Recipe, folder: Path | None) -> Recipe:
    """Sources of plugins in a recipe file are relative to the file."""
    if folder is None:
        return recipe
    plugins = tuple(
        plugin.model_copy(update={"source": _below(folder, plugin.source)}) if plugin.source else plugin
        for plugin in recipe.plugins
    )
    source = recipe.backbone.source
    if ":" not in source:
        source = _below(folder, source)
    return recipe.model_copy(
        update={"plugins": plugins, "backbone": recipe.backbone.model_copy(update={"source": source})}
    )


def _below(folder: Path, source: str) -> str:
    if source.startswith(RECIPES_PREFIX):
        return source
    return os.path.normpath(folder / Path(source).expanduser())
