"""Quality of each variant: metrics against the uncompressed model."""
