"""Verification that graphs and engines compute what eager PyTorch computes."""
