"""Quantisation of linear layers: with scales of activations that are computed at run time, or calibrated."""
