"""What decides a training run. Everything here goes into `plugin_config.json`, so that it can be repeated."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from variator_export.model.plugin_layout import Masking, Start

MatmulPrecision = Literal["float32", "bfloat16"]
Schedule = Literal["linear", "constant"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Losses(_Part):
    """The weight of each term of the loss (`training.losses`); 0 leaves it out.

    Attributes:
        hidden: Mean squared error of the last hidden states: the paper's loss.
        layers: The same of every other layer, each relative to the teacher's mean square.
        embedding: 1 - cosine of the sentence embeddings, where the backbone declares a pooling.
        logits: Kullback-Leibler divergence of the class probabilities, where the backbone has a head.
        label: Cross-entropy with the labels, where the data has them: the paper's option for adaptation.
    """

    hidden: Weight = 1.0
    layers: Weight = 0.0
    embedding: Weight = 0.0
    logits: Weight = 0.0
    label: Weight = 0.0

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("every term of the loss has the weight 0")
        return self


class Optimisation(_Part):
    """How parameters move.

    Attributes:
        steps: Steps of the optimizer.
        batch_size: Texts in each step, over all processes.
        learning_rate: Its highest value.
        schedule: `linear`: falls to 0 at the last step; `constant`.
        warmup_steps: Steps in which the learning rate rises from 0.
        weight_decay: Of Adam: added to the gradient, as torch.optim.Adam does and the paper's code uses it.
        max_grad_norm: Gradients are scaled down to this norm.
        seed: Of everything random.
        precision: Of the matrix products; parameters, their updates and the loss are float32.
        eval_every: Steps between two looks at the held-out data, each with a checkpoint.
        patience: Stop when this many looks in a row saw no better loss; None: go on to the last step.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    schedule: Schedule = "linear"
    warmup_steps: int = Field(default=50, ge=0)
    weight_decay: float = Field(default=1e-5, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: MatmulPrecision = "float32"
    eval_every: int = Field(default=200, ge=1)
    patience: int | None = Field(default=None, ge=1)


class PluginShape(_Part):
    """A plugin to be trained from its start.

    Attributes:
        ratios: One plugin is trained for each.
        bottleneck_size: Width of the decompression layer's bottleneck.
        masking: `none` as in the paper's code, or `exclude-padding`.
        start: `paper`: its initialisation; `teacher`: closer to the model without plugins
            (`model.plugin.CompressionPlugin.initialise`).
        decompression: False leaves the decompression layer out (all of its tensors stay 0): an ablation.
    """

    ratios: tuple[Annotated[int, Field(ge=2)], ...] = Field(min_length=1)
    bottleneck_size: int = Field(default=64, ge=1, le=65536)
    masking: Masking = "none"
    start: Start = "paper"
    decompression: bool = True


class PassageSettings(_Part):
    """How text is cut into what the plugins are trained on (`training.passages`).

    Attributes:
        min_tokens: Length of the shortest passages, special tokens counted.
        max_tokens: Length of the longest.
        noise: Share of tokens replaced by random ones of the vocabulary, on average; a passage's own share is
            drawn between 0 and twice this.
        held_out: Share of each document, at its end, that is only used to look at the loss.
        held_out_passages: How many passages of it are looked at.
    """

    min_tokens: int = Field(default=8, ge=3)
    max_tokens: int = Field(default=128, ge=3)
    noise: float = Field(default=0.0, ge=0, le=0.5)
    held_out: float = Field(default=0.02, gt=0, le=0.5)
    held_out_passages: int = Field(default=512, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        return self


class PretrainPreset(_Part):
    """Defaults of pre-training that belong together.

    Attributes:
        start: Where plugins start.
        bottleneck_size: Width of the bottleneck.
        masking: Of the plugins.
        losses: The terms of the loss.
        passages: How text is cut.
        learning_rate: The highest.
    """

    start: Start
    bottleneck_size: int
    masking: Masking
    losses: Losses
    passages: PassageSettings
    learning_rate: float


# `paper`: what the authors' code does, as far as it applies to an encoder alone; passages of one length.
# `default`: chosen by runs of 400 steps of equally many tokens; docs/quality.md has what was measured since.
PRETRAIN_PRESETS = {
    "default": PretrainPreset(
        start="paper",
        bottleneck_size=64,
        masking="exclude-padding",
        losses=Losses(hidden=1.0, embedding=1.0),
        passages=PassageSettings(),
        learning_rate=3e-3,
    ),
    "paper": PretrainPreset(
        start="paper",
        bottleneck_size=64,
        masking="none",
        losses=Losses(),
        passages=PassageSettings(min_tokens=128, max_tokens=128),
        learning_rate=1e-3,
    ),
}
