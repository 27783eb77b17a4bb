"""Fused kernels of the compression plugin for NVIDIA GPUs, in Triton."""
