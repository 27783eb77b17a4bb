"""Graphs of assemblies, made from the traced graph: layers left out, and weights exchanged."""
