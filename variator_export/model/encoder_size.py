"""The sizes that decide how much an encoder computes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of an encoder.

    Attributes:
        num_layers: Encoder layers L.
        hidden_size: Width d of a hidden vector.
        attention_size: heads times head size; equal to d in most families.
        intermediate_size: Width of the feed-forward network.
        num_ffn_matrices: 2, or 3 for a gated feed-forward network.
        relative_positions: Of disentangled attention (DeBERTa): so many vectors are projected in every layer,
            and scored against each query and each key.
        relative_positions_are_cut: 1 where only those that occur are used, 2 * tokens (the first DeBERTa).
    """

    num_layers: int
    hidden_size: int
    attention_size: int
    intermediate_size: int
    num_ffn_matrices: int
    relative_positions: int = 0
    relative_positions_are_cut: int = 0
