"""What a backbone family has to say about itself.

One file per family, entered in `families/__init__.py`: that table is all that another family needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from variator_export.core.encoder_size import EncoderSize

WrapFFN = Callable[[int, nn.Module], nn.Module]


@dataclass(frozen=True)
class Head:
    """What one architecture (a transformers class) returns.

    Attributes:
        outputs: Names of its outputs, as the model names them.
        token_outputs: Those with one row per token, which are cut back to the caller's length.
        init_options: Options for the class's constructor, to leave out what no output needs.
    """

    outputs: tuple[str, ...]
    token_outputs: tuple[str, ...] = ()
    init_options: Mapping[str, Any] = field(default_factory=dict)


FEATURES = Head(outputs=("last_hidden_state",), token_outputs=("last_hidden_state",))
LOGITS = Head(outputs=("logits",))


@dataclass(frozen=True)
class Family:
    """A backbone family.

    Attributes:
        name: transformers' `model_type`.
        heads: What each supported architecture returns.
        inputs: Names of its inputs.
        has_position_ids: Whether it takes absolute `position_ids`; they are then clamped to the limit.
        wrap_ffns: Replaces the feed-forward network of every encoder layer by what the given function
            makes of (layer, feed-forward network without residual and layer norm).
        size: The sizes, from the transformers configuration.
        max_length: The longest input in tokens from the configuration; None if there is no limit.
    """

    name: str
    heads: Mapping[str, Head]
    inputs: tuple[str, ...]
    has_position_ids: bool
    wrap_ffns: Callable[[nn.Module, WrapFFN], None]
    size: Callable[[Any], EncoderSize]
    max_length: Callable[[Any], int | None]


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
