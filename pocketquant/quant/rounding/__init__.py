"""Rounding by the Hessian of a layer's inputs and the Fisher matrix of its outputs, for the least loss.

encoding.py      which tensor of a plan is rounded with which statistics
rows.py          rounding with the Hessian H of the inputs; the rows are independent
two_sided.py     rounding with H and with the Fisher matrix G of the outputs
feedback.py      error feedback (GPTQ, LDLQ): every column makes up for the errors of the columns before it
descent.py       coordinate descent over codes, sub-block scales and super-block scales
state.py         the rows that are being rounded
factored.py      a Hessian with damping, and its Cholesky factor; factor_cache.py keeps the latest ones
cholesky.py      the Cholesky factorization, with one order of summation
matmul.py        the matrix product, with one order of summation
"""

from pocketquant.quant.rounding.factored import FactoredHessian, factor_hessian, losses
from pocketquant.quant.rounding.rows import DEFAULT, Rounding, round_rows
from pocketquant.quant.rounding.two_sided import round_matrix, two_sided_loss

__all__ = [
    "DEFAULT",
    "FactoredHessian",
    "Rounding",
    "factor_hessian",
    "losses",
    "round_matrix",
    "round_rows",
    "two_sided_loss",
]
