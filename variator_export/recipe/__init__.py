"""Recipes: what to build, from YAML."""
