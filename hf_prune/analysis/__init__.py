"""Looking before pruning: what each layer, and each kind, costs if it is pruned alone.

From a sweep that cuts one place after the other to a table, a heat map and a file.
"""
