"""Multiply-accumulates (MACs) computed from a formula: an upper bound on the savings of a ratio.

`graph.macs` counts the MACs of an actual graph. Comparing the two numbers exposes a wasteful graph.
"""

from variator_export.core.encoder_size import DecoderSize, EncoderSize


def analytic_macs(
    size: EncoderSize, batch_size: int, length: int, ratio: int = 1, bottleneck_size: int = 0
) -> int:
    """MACs of an encoder with a compression plugin in the split form (arXiv 2310.15724).

    Args:
        size: The sizes of the encoder.
        batch_size: Number of rows.
        length: Number of tokens in each row. The number of windows is length / ratio, without padding.
        ratio: The ratio k; 1 for no plugin.
        bottleneck_size: The plugin's bottleneck size m.

    Returns:
        MACs of one forward pass: projections, attention scores and weighted sums, feed-forward networks,
        the plugin, and the keys and values for a decoder.
    """
    d, a = size.hidden_size, size.attention_size
    attention = length * 4 * d * a + 2 * length * length * a
    ffn_per_vector = size.num_ffn_matrices * d * size.intermediate_size
    windows = length / ratio
    # Disentangled attention scores content against position, and position against content.
    num_positions = size.relative_positions
    if size.relative_positions_are_cut:
        num_positions = min(num_positions, 2 * length)
    attention += 2 * length * num_positions * a
    layer = attention + windows * ffn_per_vector
    if ratio > 1:
        compress = windows * (ratio * d * ratio + ratio * d)  # scores, weighted sum
        m = bottleneck_size
        decompress = windows * d * m + length * (d * m + m * d)  # down on y; down on x, up
        layer += compress + decompress
    positions = 2 * num_positions * d * a  # projected once for all rows
    cross = batch_size * length * d * size.cross_size
    return round(size.num_layers * (batch_size * layer + positions)) + cross


def decoder_macs(size: DecoderSize, hidden_size: int, length: int, tokens: int) -> int:
    """MACs of a decoder that generates some tokens of one text, one after the other.

    Args:
        size: The sizes of the decoder.
        hidden_size: Width d of a hidden vector.
        length: Tokens of the encoder, whose keys and values are there already.
        tokens: Generated tokens.
    """
    d, a = hidden_size, size.attention_size
    projections = 4 * d * a + 2 * d * a  # self-attention; queries and outputs of the cross-attention
    ffn = size.num_ffn_matrices * d * size.intermediate_size
    own = 2 * a * tokens * (tokens + 1) // 2  # scores and weighted sums over the tokens so far
    cross = 2 * a * length * tokens
    return size.num_layers * (tokens * (projections + ffn) + own + cross) + tokens * d * size.vocab_size
