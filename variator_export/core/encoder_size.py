"""The sizes that decide how much an encoder computes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of an encoder.

    Attributes:
        num_layers: Encoder layers L.
        hidden_size: d.
        attention_size: heads times head size; equal to d in most families.
        intermediate_size: Width of the feed-forward network.
        num_ffn_matrices: 2, or 3 for a gated feed-forward network.
    """

    num_layers: int
    hidden_size: int
    attention_size: int
    intermediate_size: int
    num_ffn_matrices: int
