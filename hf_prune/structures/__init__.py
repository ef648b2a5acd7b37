"""Heads, queries, neurons, layers, widths and channels.

Knows where they are in each family of models, which slices of which parameters belong to one, which go, and how
they are removed, recorded in a config and loaded again.
"""
