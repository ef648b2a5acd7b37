"""When a round begins and ends.

Knows step numbers and what a metric gains, and no Trainer: rounds of equal length, or rounds that end when the metric
has stopped improving.
"""
