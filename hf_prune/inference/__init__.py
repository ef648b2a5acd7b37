"""Faster inference with sparse weights.

Knows the layouts of sparse weights for which there are kernels: 2:4 on GPUs.
"""
