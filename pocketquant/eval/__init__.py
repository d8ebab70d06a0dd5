"""Measures a GGUF: against a reference on a text (`compare`), or weight by weight (`weight_errors`).

corpus      a text in windows
metrics     logits -> one record per scored position
bootstrap   standard errors
report      records -> numbers with provenance; markdown: the page of them
compare     the run that joins them
reference   what to compare with: a GGUF, a checkpoint (torch_reference), or a pack (pack, states, top, floor, replay)
weights     tensors against tensors, without inference
gate        a report against limits and the last accepted one (limits, intervals, evidence, readback, moved, verdict)
"""

from pocketquant.eval.compare import compare
from pocketquant.eval.markdown import to_markdown
from pocketquant.eval.report import Report
from pocketquant.eval.weights import WeightError, weight_errors

__all__ = ["Report", "WeightError", "compare", "to_markdown", "weight_errors"]
