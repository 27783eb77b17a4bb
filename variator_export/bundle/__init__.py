"""Bundles on disk: manifest, hash-checked files, reports and publishing."""
