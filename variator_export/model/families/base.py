"""What a backbone family has to say about itself.

One file per family, entered in `families/__init__.py`: that table is all that another family needs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from variator_export.model.encoder_size import EncoderSize

WrapFFN = Callable[[int, nn.Module], nn.Module]
Positions = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Head:
    """What one architecture (a transformers class) returns.

    Attributes:
        task: As Optimum's TasksManager names it.
        outputs: Names of its outputs, as the model names them.
        token_outputs: Those with one row per token, which are cut back to the caller's length.
        init_options: Options for the class's constructor, to leave out what no output needs.
    """

    task: str
    outputs: tuple[str, ...]
    token_outputs: tuple[str, ...] = ()
    init_options: Mapping[str, Any] = field(default_factory=dict)


_SPANS = ("start_logits", "end_logits")
FEATURES = Head("feature-extraction", ("last_hidden_state",), ("last_hidden_state",))
_HEADS = {
    "ForSequenceClassification": Head("text-classification", ("logits",)),
    "ForTokenClassification": Head("token-classification", ("logits",), ("logits",)),
    "ForQuestionAnswering": Head("question-answering", _SPANS, _SPANS),
    "ForMaskedLM": Head("fill-mask", ("logits",), ("logits",)),
}


def encoder_heads(prefix: str, model_options: Mapping[str, Any] | None = None) -> dict[str, Head]:
    """What an encoder's classes return, by their names in transformers.

    Args:
        prefix: Of the names: `Bert` for `BertModel`.
        model_options: Options for the constructor of the class without a head.
    """
    features = dataclasses.replace(FEATURES, init_options=model_options or {})
    return {f"{prefix}Model": features} | {f"{prefix}{name}": head for name, head in _HEADS.items()}


@dataclass(frozen=True)
class Family:
    """A backbone family.

    Attributes:
        name: transformers' `model_type`.
        heads: What each supported architecture returns.
        inputs: Names of its inputs.
        positions: Makes `position_ids` of (`input_ids` (B, N), the configuration) where they are absolute:
            padding to a multiple of k may go past the last that the backbone knows (length 512 with k=3 needs
            slot 513), so they are clamped to it. None: there are none, or none that can end.
        wrap_ffns: Replaces the feed-forward network of every encoder layer by what the given function
            makes of (layer, feed-forward network without residual and layer norm).
        size: The sizes, from the transformers configuration.
        max_length: The longest input in tokens from the configuration; None if there is no limit.
        refuse: Why a configuration of the family cannot be done; None: it can.
        float32_modules: The last names of modules that stay in float32 in a float16 model, as transformers
            keeps them, because their results would overflow.
    """

    name: str
    heads: Mapping[str, Head]
    inputs: tuple[str, ...]
    positions: Positions | None
    wrap_ffns: Callable[[nn.Module, WrapFFN], None]
    size: Callable[[Any], EncoderSize]
    max_length: Callable[[Any], int | None]
    refuse: Callable[[Any], str | None] = lambda _config: None
    float32_modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """One supported transformers class."""

    name: str
    family: Family
    head: Head

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, as the model names them."""
        return self.head.outputs

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """Names of the outputs with one row per token."""
        return self.head.token_outputs
