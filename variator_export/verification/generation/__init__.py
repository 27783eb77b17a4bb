"""Verification of models that generate text."""
