"""Names of the axes whose sizes a caller chooses, as used in graphs, manifests and profiles."""

from collections.abc import Mapping, Sequence

# The shape of each input, by name.
InputShapes = Mapping[str, Sequence[int]]

BATCH, LENGTH = "batch_size", "sequence_length"
