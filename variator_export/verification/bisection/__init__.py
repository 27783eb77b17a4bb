"""Locating a fault: the first module at which a graph or an engine goes wrong, and a program to show it."""
