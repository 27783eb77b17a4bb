"""The sizes that determine how much an encoder and a decoder compute."""

from dataclasses import dataclass, replace
from typing import ClassVar

from variator_export.core.assembly import DECODER_STACK, Assembly


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of an encoder.

    Attributes:
        num_layers: Number L of encoder layers.
        hidden_size: Width d of a hidden vector.
        attention_size: Number of heads times head size; equal to d in most families.
        intermediate_size: Width of the feed-forward network.
        num_ffn_matrices: Number of matrices in the feed-forward network: 2, or 3 for a gated one.
        relative_positions: Number of relative-position vectors in disentangled attention (DeBERTa). Every
            layer projects them and scores them against each query and each key.
        relative_positions_are_cut: 1 if only the 2 * tokens positions that occur are used (the first
            DeBERTa), otherwise 0.
        cross_size: Width of the keys and values for a decoder that are made of each vector of the last layer
            (`DecoderSize.cross_size`); 0 without a decoder.
    """

    # An unknown size in a manifest is refused (pydantic reads this).
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    num_layers: int
    hidden_size: int
    attention_size: int
    intermediate_size: int
    num_ffn_matrices: int
    relative_positions: int = 0
    relative_positions_are_cut: int = 0
    cross_size: int = 0


@dataclass(frozen=True)
class DecoderSize:
    """Sizes of a decoder that reads an encoder's hidden states.

    Attributes:
        num_layers: Number of decoder layers.
        num_heads: Number of attention heads, which have keys and values of their own.
        head_size: Width of a key or a value.
        intermediate_size: Width of the feed-forward network.
        num_ffn_matrices: Number of matrices in the feed-forward network: 2, or 3 for a gated one.
        vocab_size: Number of scores for each token.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    num_layers: int
    num_heads: int
    head_size: int
    intermediate_size: int
    num_ffn_matrices: int
    vocab_size: int

    @property
    def attention_size(self) -> int:
        """Number of heads times head size."""
        return self.num_heads * self.head_size

    def of_assembly(self, assembly: Assembly | None) -> "DecoderSize":
        """The sizes of an assembly's decoder; None for the original layers."""
        spans = (assembly or Assembly()).spans(DECODER_STACK, self.num_layers)
        return replace(self, num_layers=len(spans))

    @property
    def cross_size(self) -> int:
        """Width of the keys and values of all layers that are made of one vector of the encoder."""
        return 2 * self.num_layers * self.attention_size
