"""Benchmark of a bundle's speed against the alternatives that a user would pick instead."""
