"""Every error that pocketquant raises on purpose.

    PocketquantError                exit code 2 unless said otherwise
    ├── SourceError                 a checkpoint or GGUF that cannot be read as what it claims to be
    │   └── WeightError             weights that no model can have
    ├── ArchitectureError           a model that no table describes, or tensors that do not fit the table
    ├── TokenizerError              a tokenizer that would be converted incorrectly
    ├── RecipeError                 a recipe or importance matrix that cannot be applied
    ├── OutputError                 an output that cannot be written
    ├── ClusterError                machines that cannot be reached or do not run this version
    └── EvalError                   two files or a text that cannot be compared

A message says what is wrong, where, and what to do; it lists every offender (ten, then a count), not only the first.
What it quotes may be hostile, so each line is cut at a length and holds printable characters only.
"""

from __future__ import annotations

from collections.abc import Iterable

from pocketquant.escaping import LONGEST_LINE, as_lines, one_line

_SHOWN = 10


class PocketquantError(Exception):
    """Base of the tree; the command line prints its message and exits with 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(as_lines(message))


class PocketquantWarning(UserWarning):
    """What a user should know and nothing can be done about; the command line prints it as a note."""


class SourceError(PocketquantError):
    """The source cannot be read: missing, truncated, lying about itself, or not supported."""


class WeightError(SourceError):
    """Weights were read that no model can have: not finite, too large for their transform, of no scale.

    Any other `SourceError` of rows means that they could not be read, and nothing is known of the weights.
    """


class ArchitectureError(PocketquantError):
    """The tensors do not fit the architecture's table, or there is no table for it."""


class TokenizerError(PocketquantError):
    """The tokenizer is missing, incomplete, or none that the runtimes implement."""


class RecipeError(PocketquantError):
    """A recipe, or an importance matrix given with it, cannot be applied to this model."""


class OutputError(PocketquantError):
    """The output cannot be written; what stood there before is untouched."""


class ClusterError(PocketquantError):
    """The cluster cannot be reached, loses its workers, or would not compute what this machine computes."""


class EvalError(PocketquantError):
    """The files and text given cannot be compared."""


def listing(items: Iterable[str]) -> str:
    """Joins offenders one a line, indented; ten at most, then how many more there are."""
    all_items = list(items)
    lines = [f"  {one_line(item, LONGEST_LINE)}" for item in all_items[:_SHOWN]]
    if len(all_items) > _SHOWN:
        lines.append(f"  ... and {len(all_items) - _SHOWN} more")
    return "\n".join(lines)
