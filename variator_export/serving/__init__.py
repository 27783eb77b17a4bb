"""Serving under changing load: the ratio follows the work that waits.

This folder is the core, without a server and without torch: a clock's time comes in as an argument, so that
tests and simulations run it without waiting. `http/` puts a server before it.
"""
