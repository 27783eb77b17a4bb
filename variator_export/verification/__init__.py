"""Whether graphs and engines compute what eager PyTorch computes."""
