"""What a run and a model are told by.

Knows the history of rounds, counts of zeros, savings, and how they are shown as tables and plots.
"""
