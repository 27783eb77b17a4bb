"""Checks of quantised graphs."""
