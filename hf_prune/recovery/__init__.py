"""Recovering accuracy after a cut.

Knows LoRA adapters that leave pruned weights at zero, and training with the dense model as a teacher.
"""
