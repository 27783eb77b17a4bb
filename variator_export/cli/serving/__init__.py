"""Commands that run bundles for others: serve, embed, export-triton."""
