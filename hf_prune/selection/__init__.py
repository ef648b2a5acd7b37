"""Which weights go.

Knows the k lowest of any number of scores exactly, how groups of weights are ranked on one process and on many,
and that scores are checked before they decide anything.
"""
