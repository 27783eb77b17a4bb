"""Settings of a training run. All are stored in `plugin_config.json`, so that the run can be repeated."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from variator_export.model.plugin_layout import Masking, Start

MatmulPrecision = Literal["float32", "bfloat16"]
Schedule = Literal["linear", "constant"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Losses(_Part):
    """Weights of the terms of the loss (`training.losses`). The weight 0 leaves a term out.

    Attributes:
        hidden: Mean squared error of the last hidden states, which is the paper's loss.
        layers: Mean squared error of every other layer, each relative to the teacher's mean square.
        embedding: 1 - cosine of the sentence embeddings, if the backbone declares a pooling.
        decoder: Mean squared error of the decoder's last hidden states along the target text, for a backbone
            that generates text. The other half of the paper's loss.
        logits: Kullback-Leibler divergence of the class probabilities, if the backbone has a head; of the
            next token's probabilities along the target text, if it generates text.
        label: Cross-entropy with the labels or the target text, if the data has any. The paper's option for
            adaptation.
    """

    hidden: Weight = 1.0
    layers: Weight = 0.0
    embedding: Weight = 0.0
    decoder: Weight = 0.0
    logits: Weight = 0.0
    label: Weight = 0.0

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("every term of the loss has the weight 0")
        return self


class Optimisation(_Part):
    """Settings of the optimizer and the training loop.

    Attributes:
        steps: Number of optimizer steps.
        batch_size: Texts per step, over all processes.
        learning_rate: Peak learning rate.
        schedule: `linear` lets the learning rate fall to 0 at the last step; `constant` keeps it.
        warmup_steps: Warm-up steps, in which the learning rate rises from 0.
        weight_decay: Weight decay of Adam, added to the gradient as in torch.optim.Adam and the paper's code.
        max_grad_norm: Maximum norm to which gradients are clipped.
        seed: Seed of everything random.
        precision: Precision of the matrix products. Parameters, their updates and the loss are float32.
        eval_every: Steps between two evaluations on the held-out data. Each writes a checkpoint.
        patience: Number of evaluations in a row without a better loss after which training stops; None to
            train to the last step.
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
    """Shape and initialisation of plugins that are trained from scratch.

    Attributes:
        ratios: Ratios; one plugin is trained for each.
        bottleneck_size: Width of the decompression layer's bottleneck.
        masking: `none` as in the paper's code, or `exclude-padding`.
        start: Initialisation: `paper`, as in the paper, or `teacher`, closer to the model without plugins
            (`model.plugin.CompressionPlugin.initialise`).
        decompression: False leaves out the decompression layer (all of its tensors stay 0), as an ablation.
    """

    ratios: tuple[Annotated[int, Field(ge=2)], ...] = Field(min_length=1)
    bottleneck_size: int = Field(default=64, ge=1, le=65536)
    masking: Masking = "none"
    start: Start = "paper"
    decompression: bool = True


class PassageSettings(_Part):
    """Settings for cutting text into the passages that plugins are trained on (`training.passages`).

    Attributes:
        min_tokens: Length of the shortest passages, including special tokens.
        max_tokens: Length of the longest passages, including special tokens.
        noise: Average share of tokens that are replaced by random tokens of the vocabulary. The share of each
            passage is drawn between 0 and twice this value.
        corruption: Share of tokens that are left out in spans, which the decoder of T5 then generates
            (arXiv 1910.10683, 3.1.4). 0 for whole passages without a target.
        held_out: Share of the text that is held out and used only to evaluate the loss: the end of each
            document, or whole documents of a source with many documents.
        held_out_passages: Number of held-out passages in each evaluation.
    """

    min_tokens: int = Field(default=8, ge=3)
    max_tokens: int = Field(default=128, ge=3)
    noise: float = Field(default=0.0, ge=0, le=0.5)
    corruption: float = Field(default=0.0, ge=0, le=0.5)
    held_out: float = Field(default=0.02, gt=0, le=0.5)
    held_out_passages: int = Field(default=512, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        return self


class PretrainPreset(_Part):
    """A set of defaults for pre-training that belong together.

    Attributes:
        start: Initialisation of the plugins.
        bottleneck_size: Width of the decompression layer's bottleneck.
        masking: Masking of the plugins.
        losses: Weights of the terms of the loss.
        passages: Settings for cutting text into passages.
        learning_rate: Peak learning rate.
    """

    start: Start
    bottleneck_size: int
    masking: Masking
    losses: Losses
    passages: PassageSettings
    learning_rate: float


# `paper`: the settings of the authors' code, as far as they apply to an encoder alone; one passage length.
# `default`: chosen by runs of 400 steps with equal numbers of tokens. docs/quality.md has later measurements.
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
