"""History and reports: what a run did, and how sparse a model is.

Knows the history of rounds, counts of zeros, savings, and how they are shown as tables and plots.
"""
