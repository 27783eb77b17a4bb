"""Recipes: typed, validated descriptions of a build. Unknown keys are refused; `recipe_file` reads YAML."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from variator_export.core.precision import PRECISIONS
from variator_export.recipe.assemblies import VARIANT_NAME as VARIANT_NAME
from variator_export.recipe.assemblies import Assemblies, ModulesRecipe, StrategyRecipe, VariantName
from variator_export.recipe.builder_options import BuilderOptions
from variator_export.recipe.part import RecipeModel as _Part
from variator_export.recipe.part import known

DEFAULT_RECIPE = "minilm"
PrecisionName = Annotated[
    str, AfterValidator(lambda name: known(name, PRECISIONS.names())), WithJsonSchema({"type": "string"})
]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")]
CAPABILITIES = r"^sm[0-9]{2,3}(\+sm[0-9]{2,3})*$"
Range = tuple[
    Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
]  # min, opt, max


# Or one number for all three.
Sizes = Annotated[
    Range,
    BeforeValidator(
        lambda size: (size,) * 3 if type(size) is int else size,
        json_schema_input_type=Range | Annotated[int, Field(ge=1)],
    ),
]


class BackboneRecipe(_Part):
    """The pretrained transformer."""

    source: str
    """A folder, `hub:ORGANISATION/NAME[@REVISION]`, `package:DISTRIBUTION/PATH`, or `recipes:PATH` for a
    model that ships with this package."""
    sha256: Sha256 | None = None
    """The expected sha256 of the weights; None to accept any."""
    task: str | None = None
    """The model's task, as named by Optimum (`feature-extraction`). It selects the transformers class within
    the model's family; None for the task of the class that config.json names."""
    architecture: str | None = None
    """The transformers class to load, instead of choosing one by task."""
    label_words: dict[str, str] | None = None
    """The word of each label, in the order of the classes, each one token of the model: makes a classifier of
    a model that generates text, by the scores of the words after one step of the decoder."""
    decoder_prompt: str = ""
    """What the decoder reads after its start token, before the label word: `<extra_id_0>` in the paper."""

    @model_validator(mode="after")
    def _one_choice(self) -> "BackboneRecipe":
        if self.task is not None and self.architecture is not None:
            raise ValueError("give task or architecture, not both")
        return self


class Initialise(_Part):
    """An untrained plugin, created by the paper's initialisation."""

    bottleneck_size: int = Field(default=64, ge=1)
    """Bottleneck width of the decompression layer."""
    masking: Literal["none", "exclude-padding"] = "none"
    """The masking of padding: `none` as in the paper's code, or `exclude-padding`."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random generator."""


class PluginRecipe(_Part):
    """One compression plugin: read from a folder, or created by initialisation."""

    method: str = "variator"
    """The method that builds the variant: `variator`, or a method of an installed distribution."""
    name: VariantName | None = None
    """The variant's name; None for `ratio-K`."""
    ratio: int | None = Field(default=None, ge=2)
    """The plugin's compression ratio; optional for a folder, which states its ratio."""
    source: str | None = None
    """A folder with `plugin_config.json` and `plugin.safetensors`;
    `hub:ORGANISATION/NAME[/FOLDER][@REVISION]`; or `recipes:PATH` for a plugin of the package."""
    initialise: Initialise | None = None
    """Settings for creating an untrained plugin, instead of a source."""

    @model_validator(mode="after")
    def _one_origin(self) -> "PluginRecipe":
        if (self.source is None) == (self.initialise is None):
            raise ValueError("a plugin has either a source or initialise")
        if self.initialise is not None and self.ratio is None:
            raise ValueError("a plugin with initialise needs a ratio")
        return self


class GraphsRecipe(_Part):
    """How graphs are written. A value that is not given is taken from the bundle, if that exists."""

    opset: Literal[20, 21, 23] | None = None
    """ONNX opset of the graphs. 23 (default) has the Attention operator; 20 and 21 have attention as matrix
    products and a softmax, for ONNX Runtime before 1.23. int8 needs at least 21."""
    default_variant: Annotated[int, Field(ge=1)] | VariantName | None = None
    """The ratio or the name of the variant that is also `model.onnx`, and that sessions run unless a call
    chooses; ratio 1 by default."""
    adapters: bool | None = None
    """Also write each plugin as `ratio-K.onnx_adapter`, ONNX Runtime's format; false by default."""


class VerifyRecipe(_Part):
    """Inputs for verifying graphs, besides a grid of shapes."""

    texts: tuple[str, ...] = ()
    """Real texts; if empty, a few texts that ship with the package."""
    seed: int = 0
    """Seed of the random token ids in the grid."""


class CalibrationRecipe(_Part):
    """Texts on which the scales of a static quantisation are found: texts of the kind that will be read."""

    data: str
    """A file (.tsv, .csv, .jsonl or .conll, relative to the recipe), or `datasets:NAME[,CONFIG],SPLIT`."""
    text_column: str = "text"
    """Column of the text."""
    pair_column: str | None = None
    """Column of the second text of a pair that the model reads together; None for single texts."""
    texts: int = Field(default=512, ge=32)
    """The number of texts to use, evenly spaced over the data."""
    max_tokens: int | None = Field(default=None, ge=3)
    """Truncate longer texts to this number of tokens; None for the model's limit."""


class QuantizationRecipe(_Part):
    """Settings and limits of a precision that quantises. Other precisions do not read them."""

    calibration: CalibrationRecipe | None = None
    """Texts to calibrate int8-static, int8-float16 and fp8 on, which need them. int8 needs none."""

    float32_modules: tuple[str, ...] = ()
    """Modules of the encoder whose linear layers are not quantised, as part of a dotted name in transformers:
    `value`, `encoder.layer.5` or `attention.self.value`. The family's own exceptions are added."""
    min_cosine: float = Field(default=0.97, ge=-1, le=1)
    """The smallest mean cosine of embeddings or hidden states with those of float32 at the same ratio, over
    `verify.texts`."""
    min_agreement: float = Field(default=0.9, ge=0, le=1)
    """The smallest share of equal classes, for outputs that are classes."""


class QualityRecipe(_Part):
    """Data on which a build evaluates every ratio before it publishes the bundle."""

    data: str
    """A file (.tsv, .csv, .jsonl or .conll, relative to the recipe), or `datasets:NAME[,CONFIG],SPLIT`."""
    text_column: str = "text"
    """Column of the text."""
    pair_column: str | None = None
    """Column of the second text of a pair."""
    label_column: str | None = "label"
    """Column of the label or the score; None for data without."""
    task: str | None = None
    """Task to evaluate; None for the first that the model and the data allow."""
    max_tokens: int | None = Field(default=None, ge=3)
    """Truncate longer texts to this number of tokens; None for the model's limit."""
    generation: Annotated[dict[str, Any], WithJsonSchema({"type": "object"})] = Field(default_factory=dict)
    """Changes of the model's own settings of generation, such as `max_new_tokens`; for models that generate
    text."""
    max_loss: float = Field(ge=0, le=1)
    """The largest share of the task's main metric that a ratio may lose against ratio 1; in int8, against
    ratio 1 in float32. A build that loses more publishes nothing."""


class SpeedRecipe(_Part):
    """The speed measurement at the end of a build."""

    batch_size: int = Field(default=8, ge=1)
    """Rows per batch."""
    sequence_length: int = Field(default=128, ge=1)
    """Tokens per row."""
    rounds: int = Field(default=6, ge=2)
    """The number of rounds that count, rounded up to an even number; each subject, a variant on a runtime, is
    timed once per round. Timing goes on until the medians of both halves agree, for at most three times as
    many rounds."""
    block_seconds: float = Field(default=0.4, gt=0)
    """The time that one subject runs per round, in seconds, without its warm-up."""


class ShapeSet(_Part):
    """The shapes of one optimization profile of an engine, as (min, opt, max), or one number for all three.

    A profile for one shape alone lets the builder choose kernels for that shape."""

    batch_size: Sizes = (1, 8, 32)
    """Rows per batch."""
    sequence_length: Sizes = (1, 128, 512)
    """Tokens per row, within the model's limit."""
    new_tokens: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """Models that generate text only: the usual and the largest number of generated tokens per row,
    within the model's limit. By default 32 and 128."""
    num_beams: Annotated[int, Field(ge=1)] | None = None
    """Models that generate text only: the most beams, or returned sequences, of an input. The engine of the
    decoder takes so many rows for each row of the batch. 1 by default."""

    @model_validator(mode="after")
    def _ordered(self) -> "ShapeSet":
        if self.new_tokens is not None and self.new_tokens[0] > self.new_tokens[1]:
            raise ValueError(f"new_tokens must be [usual, most] with usual <= most, but is {self.new_tokens}")
        for name in ("batch_size", "sequence_length"):
            low, opt, high = getattr(self, name)
            if not low <= opt <= high:
                raise ValueError(f"{name} must be min <= opt <= max, but is {low}, {opt}, {high}")
        return self


class EngineRecipe(BuilderOptions):
    """Settings for building engines. A target refuses settings that it does not support."""

    profiles: dict[VariantName, ShapeSet] = Field(default={"default": ShapeSet()}, min_length=1)
    """Sets of shapes by name. Each is an optimization profile, for example one for single short texts and
    one for batches."""
    per_ratio: bool = True
    """Build an engine for each ratio."""
    any_ratio: bool = False
    """Build one engine that runs every ratio, with a profile for each ratio and set of shapes. It holds the
    weights once."""
    compute_capabilities: tuple[Annotated[str, StringConstraints(pattern=CAPABILITIES)], ...] = ()
    """`tensorrt-rtx` only: the GPUs to build for, `sm89`, or `sm86+sm89` for one engine for both. Each entry
    builds separate engines. Empty for one engine that runs on all GPUs that the target supports."""

    @property
    def builder(self) -> BuilderOptions:
        """The builder options alone."""
        return BuilderOptions(**{name: getattr(self, name) for name in BuilderOptions.model_fields})

    @field_validator("compute_capabilities")
    @classmethod
    def _in_one_order(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Sort the GPUs in each name (sm120+sm86 becomes sm86+sm120) and remove duplicates."""
        parts = [sorted(set(name.split("+")), key=lambda sm: int(sm.removeprefix("sm"))) for name in names]
        return tuple(dict.fromkeys("+".join(part) for part in parts))

    @model_validator(mode="after")
    def _makes_something(self) -> "EngineRecipe":
        if not (self.per_ratio or self.any_ratio):
            raise ValueError(
                "per_ratio and any_ratio are both off; building engines needs at least one of them"
            )
        return self


class Recipe(_Part):
    """Everything that determines the result of a build."""

    name: VariantName
    """The recipe's name. It names the bundle's default folder, artifacts/NAME."""
    backbone: BackboneRecipe
    """The pretrained transformer."""
    plugins: tuple[PluginRecipe, ...] = ()
    """The available compression plugins."""
    modules: tuple[ModulesRecipe, ...] = ()
    """The available modules."""
    assemblies: Assemblies = ()
    """Variants whose layers are original ones and modules, as specifications such as `enc=2,2,1x8`."""
    strategies: tuple[StrategyRecipe, ...] = ()
    """Assemblies that are chosen for a budget."""
    ratios: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """The ratios to build; None for the ratios of all plugins. The baseline, ratio 1, is always built."""
    precision: PrecisionName = "float32"
    """The precision of the graphs and engines: float32, float16, bfloat16; with quantised linear layers int8
    and int8-static (for CPUs), int8-float16 and fp8 (for GPUs); or one added by an installed distribution."""
    quantization: QuantizationRecipe = QuantizationRecipe()
    """Settings and limits of precisions that quantise."""
    graphs: GraphsRecipe = GraphsRecipe()
    """How graphs are written."""
    targets: tuple[str, ...] = ("onnxruntime",)
    """The targets to build engines for: `tensorrt-rtx`, `tensorrt`, or a target of an installed distribution.
    `onnxruntime` runs the graphs directly, without engines."""
    verify: VerifyRecipe = VerifyRecipe()
    """Inputs for verifying graphs."""
    quality: QualityRecipe | None = None
    """Data on which every ratio is evaluated before the bundle is published; None to skip the evaluation."""
    speed: SpeedRecipe | None = SpeedRecipe()
    """The speed measurement at the end of a build; None to skip the measurement."""
    engine: EngineRecipe = EngineRecipe()
    """Settings for building engines."""
