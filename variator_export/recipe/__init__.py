"""Recipes: descriptions of a build, read from YAML."""
