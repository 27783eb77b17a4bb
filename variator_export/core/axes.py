"""Names of the axes whose sizes a caller chooses, as used in graphs, manifests and profiles."""

BATCH, LENGTH = "batch_size", "sequence_length"
