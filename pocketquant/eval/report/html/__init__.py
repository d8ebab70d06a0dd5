"""Reports as pages for people: one HTML file that needs nothing else, and Markdown for a model card.

sheet       report JSON -> what a page shows, checked
taking      JSON values, checked
drift       benchmark results
published   what others measured, for scale
svg         elements, scales, axes
charts      size against divergence, curves, rows of dots
heat        each tensor's error, layers by role
words       sentences and cells for both pages
again       how to run it again
page        HTML (template and style lie beside it)
card        Markdown
"""

from pocketquant.eval.report.html.card import to_card
from pocketquant.eval.report.html.page import to_html
from pocketquant.eval.report.html.sheet import Sheet, read_sheet, to_sheet

__all__ = ["Sheet", "read_sheet", "to_card", "to_html", "to_sheet"]
