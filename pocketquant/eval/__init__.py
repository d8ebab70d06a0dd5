"""Measures a GGUF: against a reference on a text (`compare`), or weight by weight (`weight_errors`).

compare    the run; windows: one text of it; metrics: logits -> one record per scored position
measures   records -> statistics; bootstrap, intervals: their standard errors and confidence intervals
reference  what to compare with: a GGUF, a checkpoint (torch_reference), or a pack (packs/)
kinship    whether two files can be the same model; kernels: whether two figures come from the same kernels
weights    tensors against tensors, without inference
vision     two vision towers; tasks/: benchmarks and chats
report/    the report: schema, Markdown, HTML
gate/      a report against limits and the last accepted one
"""

from pocketquant.eval.compare import compare
from pocketquant.eval.report.markdown import to_markdown
from pocketquant.eval.report.schema import Report
from pocketquant.eval.weights import TensorError, weight_errors

__all__ = ["Report", "TensorError", "compare", "to_markdown", "weight_errors"]
