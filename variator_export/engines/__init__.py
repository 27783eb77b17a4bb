"""Targets: one module or folder each."""
