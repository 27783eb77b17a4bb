"""Bundles on disk: the manifest, files behind their hashes, reports, publishing."""
