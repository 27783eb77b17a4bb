"""The sizes that determine how much an encoder computes."""

from dataclasses import dataclass
from typing import ClassVar


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
