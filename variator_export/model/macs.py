"""Multiply-accumulates (MACs) by formula: the limit of what a ratio can save.

Those of a graph are counted in `graph.macs`: a wasteful graph is seen when the two stand side by side.
"""

from variator_export.model.encoder_size import EncoderSize


def analytic_macs(
    size: EncoderSize, batch_size: int, length: int, ratio: int = 1, bottleneck_size: int = 0
) -> int:
    """MACs of an encoder with a compression plugin in the split form (arXiv 2310.15724).

    Args:
        size: The sizes of the encoder.
        batch_size: Rows.
        length: Tokens in each row. Windows are counted as length / ratio, without padding.
        ratio: k; 1: no plugin.
        bottleneck_size: m of the plugin.

    Returns:
        MACs of one forward pass: projections, attention scores and weighted sums, feed-forward networks,
        and the plugin.
    """
    d, a = size.hidden_size, size.attention_size
    attention = length * 4 * d * a + 2 * length * length * a
    ffn_per_vector = size.num_ffn_matrices * d * size.intermediate_size
    windows = length / ratio
    # Disentangled attention: content to position, and position to content.
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
    return round(size.num_layers * (batch_size * layer + positions))
