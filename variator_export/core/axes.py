"""The axes that a caller of a graph chooses, as graphs, manifests and profiles name them."""

BATCH, LENGTH = "batch_size", "sequence_length"
