"""Which parameters are pruned, and what is kept of them.

Knows how each target reads as a matrix, the masks beside a model and their files, the hooks that zero
gradients, copies of weights, and how far training has moved them.
"""
