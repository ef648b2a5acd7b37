"""A training that prunes.

Knows what a Trainer hands to an event, what a run does with it, which metric decides, what a cut does to the
optimizer, and how an interrupted run is resumed.
"""
