"""What the data says.

Knows how calibration samples are drawn and passed through a model, layer inputs, the
statistics that criteria ask for, and what a forward pass costs. Afterwards the model is as it was.
"""
