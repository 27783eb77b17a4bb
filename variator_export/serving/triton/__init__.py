"""Triton Inference Server: model repositories of a bundle, and the model that its Python backend runs."""
