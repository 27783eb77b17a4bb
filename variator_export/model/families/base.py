"""The description of a backbone family.

Each family has one file and is listed in `families/__init__.py`. Adding a family needs no other change.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from variator_export.core.assembly import ENCODER_STACK, Stack
from variator_export.core.encoder_size import DecoderSize, EncoderSize
from variator_export.model.decoders.label_words import LabelWords

WrapFFN = Callable[[int, nn.Module], nn.Module]
Positions = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Head:
    """The task and outputs of one architecture (a transformers class).

    Attributes:
        task: Name of the task in Optimum's TasksManager.
        outputs: Names of the model's outputs, as the model spells them.
        token_outputs: Names of the outputs with one row per token, which are cut back to the caller's length.
        init_options: Options for the class's constructor, to leave out modules that no output needs.
        generates: Whether the model generates text with the family's decoder. The outputs are then those of
            the encoder, without the keys and values for the decoder.
        label_words: The words whose scores after the decoder's first step are the logits. None for a model
            that has a head for its task.
    """

    task: str
    outputs: tuple[str, ...]
    token_outputs: tuple[str, ...] = ()
    init_options: Mapping[str, Any] = field(default_factory=dict)
    generates: bool = False
    label_words: LabelWords | None = None

    @property
    def has_decoder(self) -> bool:
        """Whether the family's decoder runs after the encoder."""
        return self.generates or self.label_words is not None


_SPANS = ("start_logits", "end_logits")
FEATURES = Head("feature-extraction", ("last_hidden_state",), ("last_hidden_state",))
TEXT_TO_TEXT = Head("text2text-generation", ("last_hidden_state",), ("last_hidden_state",), generates=True)
CLASSIFICATION = Head("text-classification", ("logits",))
_HEADS = {
    "ForSequenceClassification": CLASSIFICATION,
    "ForTokenClassification": Head("token-classification", ("logits",), ("logits",)),
    "ForQuestionAnswering": Head("question-answering", _SPANS, _SPANS),
    "ForMaskedLM": Head("fill-mask", ("logits",), ("logits",)),
}


def encoder_heads(prefix: str, model_options: Mapping[str, Any] | None = None) -> dict[str, Head]:
    """Heads of an encoder's classes, by class name in transformers.

    Args:
        prefix: Prefix of the class names: `Bert` for `BertModel`.
        model_options: Options for the constructor of the class without a head.
    """
    features = dataclasses.replace(FEATURES, init_options=model_options or {})
    return {f"{prefix}Model": features} | {f"{prefix}{name}": head for name, head in _HEADS.items()}


@dataclass(frozen=True)
class Decoder:
    """The decoder of a family with two stacks.

    Attributes:
        stack: Name of the module that holds the decoder layers, inside transformers' base model.
        cross_projections: Function of a decoder layer that returns the linear layers of its cross-attention
            that make keys and values out of the encoder's hidden states.
        size: Function of the configuration that returns the decoder's sizes.
        max_length: Function of the configuration that returns the longest output in tokens; None if there is
            no limit.
        texts_like_sources: Whether the target text is tokenised as a source is. False for mBART, whose right
            text has a language of its own.
    """

    stack: str
    cross_projections: Callable[[nn.Module], tuple[nn.Module, nn.Module]]
    size: Callable[[Any], DecoderSize]
    max_length: Callable[[Any], int | None]
    texts_like_sources: bool = True

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder layers of a transformers model, in order."""
        base = getattr(model, "base_model", model)
        layers: Any = base.get_submodule(self.stack)
        return list(layers)


@dataclass(frozen=True)
class Family:
    """A backbone family.

    Attributes:
        name: The `model_type` of the family in transformers.
        heads: Head of each supported architecture.
        inputs: Names of the backbone's inputs.
        positions: Function of (`input_ids` (B, N), the configuration) that returns `position_ids` for
            absolute positions. Padding to a multiple of k may exceed the backbone's last position (length 512
            with k=3 needs slot 513), so the ids are clamped to it. None if the backbone has no position ids,
            or has no last position, or finds the positions itself.
        stack: Name of the module that holds the encoder layers, inside transformers' base model.
        wrap_ffns: Replaces the feed-forward network of every encoder layer by the result of the given
            function of (layer, feed-forward network without residual and layer norm).
        size: Function of the transformers configuration that returns the encoder's sizes.
        max_length: Function of the configuration that returns the longest input in tokens; None if there is
            no limit.
        refuse: Function of the configuration that returns the reason why it is not supported; None if it is
            supported.
        float32_modules: Last name components of the modules that stay in float32 in a float16 or int8 model,
            as in transformers: their results would overflow float16, and their inputs have the outliers that
            int8 rounds worst.
        clamp_positions: For a backbone that finds its positions itself: makes its encoder clamp them, in
            place, for the same reason. None if it need not.
        decoder: The decoder, for classes that generate text. None in a family of encoders.
        first_layer_tensors: Names of the tensors, within a layer, that only the first layer of a stack holds
            and all layers use. They stay when a module replaces that layer (`model.modular`).
        share_first: Function of (a layer, the stack's own first layer) that lets the layer be the first of an
            assembly, in place: it shares those tensors. None if every layer can be the first.
        refuse_assembly: Function of the configuration that returns the reason why layers cannot be left out
            or replaced; None if they can.
        padding_states_vary: Whether the hidden states of padding depend on the amount of padding. A plugin
            that does not exclude padding reads them, so its outputs depend on it too.
    """

    name: str
    heads: Mapping[str, Head]
    inputs: tuple[str, ...]
    positions: Positions | None
    stack: str
    wrap_ffns: Callable[[nn.Module, WrapFFN], None]
    size: Callable[[Any], EncoderSize]
    max_length: Callable[[Any], int | None]
    refuse: Callable[[Any], str | None] = lambda _config: None
    float32_modules: tuple[str, ...] = ()
    clamp_positions: Callable[[nn.Module], None] | None = None
    decoder: Decoder | None = None
    first_layer_tensors: tuple[str, ...] = ()
    share_first: Callable[[nn.Module, nn.Module], None] | None = None
    refuse_assembly: Callable[[Any], str | None] = lambda _config: None
    padding_states_vary: bool = False

    def stack_path(self, stack: Stack) -> str:
        """Name of the module that holds a stack's layers, inside transformers' base model."""
        if stack == ENCODER_STACK:
            return self.stack
        assert self.decoder is not None
        return self.decoder.stack


@dataclass(frozen=True)
class Architecture:
    """One supported transformers class."""

    name: str
    family: Family
    head: Head

    def encoder(self, model: Any) -> Any:
        """What token ids run through first: the encoder if a decoder follows, else the whole model."""
        return model.get_encoder() if self.head.has_decoder else model

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, as the model spells them."""
        return self.head.outputs

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """Names of the outputs with one row per token."""
        return self.head.token_outputs
