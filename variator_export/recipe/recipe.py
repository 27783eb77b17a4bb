"""Recipes: what to build. Typed, validated, unknown keys refused; `recipe_file` reads them from YAML."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from variator_export.core.precision import PRECISIONS
from variator_export.recipe.builder_options import BuilderOptions
from variator_export.recipe.part import RecipePart as _Part
from variator_export.recipe.part import known

DEFAULT_RECIPE = "minilm"
PrecisionName = Annotated[
    str, AfterValidator(lambda name: known(name, PRECISIONS.names())), WithJsonSchema({"type": "string"})
]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")]
CAPABILITIES = r"^sm[0-9]{2,3}(\+sm[0-9]{2,3})*$"
VARIANT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
VariantName = Annotated[str, StringConstraints(pattern=VARIANT_NAME)]
Range = tuple[
    Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
]  # min, opt, max


class BackboneRecipe(_Part):
    """The pretrained transformer."""

    source: str
    """A folder, `hub:ORGANISATION/NAME[@REVISION]`, or `package:DISTRIBUTION/PATH`."""
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

    method: str = "variator"
    """By which method its variant is made: `variator`, or that of an installed distribution."""
    name: VariantName | None = None
    """The variant's name; None: `ratio-K`."""
    ratio: int | None = Field(default=None, ge=2)
    """Its ratio; may be left out for a folder, which says it itself."""
    source: str | None = None
    """A folder with `plugin_config.json` and `plugin.safetensors`;
    `hub:ORGANISATION/NAME[/FOLDER][@REVISION]`; or `recipes:PATH` for one that comes with the package."""
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


class ShapeSet(_Part):
    """The shapes that an optimization profile of an engine is for, as (min, opt, max)."""

    batch_size: Range = (1, 8, 32)
    """Rows."""
    sequence_length: Range = (1, 128, 512)
    """Tokens, within the model's limit."""

    @model_validator(mode="after")
    def _ordered(self) -> "ShapeSet":
        for name in ("batch_size", "sequence_length"):
            low, opt, high = getattr(self, name)
            if not low <= opt <= high:
                raise ValueError(f"{name} must be min <= opt <= max, and is {low}, {opt}, {high}")
        return self


class EngineRecipe(BuilderOptions):
    """How engines are built. A target refuses what it cannot do."""

    profiles: dict[VariantName, ShapeSet] = Field(default={"default": ShapeSet()}, min_length=1)
    """Sets of shapes by name, each an optimization profile: say, a quick short one beside one of batches."""
    per_ratio: bool = True
    """An engine for each ratio."""
    any_ratio: bool = False
    """One engine that runs every ratio, with a profile for each ratio and set of shapes; it holds the weights
    once."""
    compute_capabilities: tuple[Annotated[str, StringConstraints(pattern=CAPABILITIES)], ...] = ()
    """`tensorrt-rtx` only: the GPUs to build for, `sm89`, or `sm86+sm89` for one engine for both; each entry
    gives engines of its own. None: one that runs on all that the target knows."""

    @property
    def builder(self) -> BuilderOptions:
        """The options of the builder alone."""
        return BuilderOptions(**{name: getattr(self, name) for name in BuilderOptions.model_fields})

    @field_validator("compute_capabilities")
    @classmethod
    def _in_one_order(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """sm120+sm86 is sm86+sm120, and twice the same is once."""
        parts = [sorted(set(name.split("+")), key=lambda sm: int(sm.removeprefix("sm"))) for name in names]
        return tuple(dict.fromkeys("+".join(part) for part in parts))

    @model_validator(mode="after")
    def _makes_something(self) -> "EngineRecipe":
        if not (self.per_ratio or self.any_ratio):
            raise ValueError("per_ratio and any_ratio are both off; an engine needs one of them")
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
    precision: PrecisionName = "float32"
    """Of the graphs and engines: float32, float16, bfloat16, or one of an installed distribution."""
    targets: tuple[str, ...] = ("onnxruntime",)
    """What to build engines for: `tensorrt-rtx`, `tensorrt`, or the target of an installed distribution.
    Graphs run on `onnxruntime` as they are."""
    verify: VerifyRecipe = VerifyRecipe()
    """What graphs are verified on."""
    speed: SpeedRecipe | None = SpeedRecipe()
    """The measurement at the end; None: none."""
    engine: EngineRecipe = EngineRecipe()
    """How engines are built."""
