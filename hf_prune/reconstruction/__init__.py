"""Kept weights that make up for the lost ones.

Knows the stages of a forward pass, what may be computed once, what goes into each weight, SparseGPT, which prunes
stage by stage, and the compensation of pruned structures.
"""
