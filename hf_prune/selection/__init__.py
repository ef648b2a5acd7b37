"""Which weights go.

Knows the k lowest of any number of scores exactly, how a criterion's scores are checked, and what each granularity
does in a cut: single weights, patterns, blocks and structures, on one process and on many.
"""
