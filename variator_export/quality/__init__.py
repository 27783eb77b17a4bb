"""What each variant is worth: metrics against the uncompressed model."""
