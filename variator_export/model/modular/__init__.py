"""Modules of Modular Transformers (arXiv 2306.02379): layers that each do the work of several."""
