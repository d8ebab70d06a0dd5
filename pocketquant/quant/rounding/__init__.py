"""Rounding by curvature: which bytes of a format lose least, given what the layer's inputs and outputs are like.

state.py      rows while they are being rounded
prepared.py   a second moment, damped and factored
product.py    a matrix product with one order of summation
feedback.py   every column makes up for the errors before it
descent.py    every code, scale and unit moves to where the objective is least
rows.py       by the inputs alone: rows are independent
matrix.py     by inputs and outputs
encoding.py   for the tensors of a plan, by statistics
"""

from pocketquant.quant.rounding.prepared import Prepared, losses, prepare
from pocketquant.quant.rounding.rows import DEFAULT, Rounding, round_rows
from pocketquant.quant.rounding.two_sided import round_matrix, two_sided_loss

__all__ = ["DEFAULT", "Prepared", "Rounding", "losses", "prepare", "round_matrix", "round_rows", "two_sided_loss"]
