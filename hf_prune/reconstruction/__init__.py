"""Kept weights that make up for the lost ones.

Knows the stages of a forward pass, what may be computed once, and SparseGPT, which prunes stage by stage.
"""
