"""Training of modules (arXiv 2306.02379): module replacing and distillation."""
