"""When a cut happens.

Knows what a Trainer hands to an event, when rounds begin and end, which metric decides, what a cut does to the
optimizer, and how an interrupted run is resumed.
"""
