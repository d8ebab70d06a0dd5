"""Tuning: a finished file, its blocks moved to where the whole model diverges least.

tune          the run
optimizer     the quantized model in torch, and the steps
block_scales  a tensor's blocks as numbers that can be moved; free_codes: the codes
"""
