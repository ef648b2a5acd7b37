"""Several processes, one answer.

Knows which rows of a tensor a process holds (FSDP2, ZeRO), how processes count, agree and fail together, and
how tensors are digested and written to files that appear whole or not at all.
"""
