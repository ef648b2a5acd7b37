"""Structures: attention heads, neurons, channels and layers, found, removed and loaded again."""
