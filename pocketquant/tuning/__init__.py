"""Tuning: the blocks of a finished file are moved so that the whole model diverges least from its reference.

tune          the run, from the windows to the tuned file
optimizer     the quantized model in torch, and its optimizer steps
block_scales  the F16 scales of a tensor's blocks as numbers that can move
free_codes    the codes as numbers that can move
"""
