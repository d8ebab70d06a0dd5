"""`compare`: two GGUF files side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketquant.cli.group import refuse_given
from pocketquant.cli.inspect import shortened
from pocketquant.cli.options import Chunks, Compute, Context, EvalTexts, Talk
from pocketquant.cli.screen import print_json, print_lines, print_table

if TYPE_CHECKING:
    from pocketquant.eval.difference import Directions, FileDifference, TensorForm
    from pocketquant.model import Value

_WITH_TEXT = {"context", "chunks", "threads", "gpu_layers"}


@dataclass(frozen=True)
class CompareOptions:
    """Texts that both files are run over."""

    text: EvalTexts = None
    context: Context = 512
    chunks: Chunks = None


def compare(
    command_line: typer.Context,
    first: Annotated[Path, typer.Argument(metavar="A.gguf", help="The first GGUF.")],
    second: Annotated[Path, typer.Argument(metavar="B.gguf", help="The second GGUF, of the same model.")],
    *,
    options: CompareOptions,
    compute: Compute,
    talk: Talk,
) -> None:
    """Set two GGUF files side by side: types, bytes, metadata, weights.

    With --text, it also measures the KL divergence between them, in both directions.
    """
    from pocketquant.eval.difference import find_differences, measure_both_ways
    from pocketquant.texts.embedded import read_texts

    directions = None
    if options.text is None:
        refuse_given(command_line, _WITH_TEXT, "is used only with --text")
    else:
        texts = read_texts(options.text)
        with talk.steps("divergence", "windows", (1, 2)) as advance:
            directions = measure_both_ways(
                first,
                second,
                texts,
                context=options.context,
                chunks=options.chunks,
                threads=compute.threads,
                gpu_layers=compute.gpu_layers,
                progress=advance,
            )
    with talk.steps("weights", "tensors", (2, 2) if options.text else None) as advance:
        found = find_differences(first, second, progress=advance, divergence=directions)
    if talk.json:
        document = found.to_json()
        for pair in document["metadata"]:
            for side in ("first", "second"):
                pair[side] = pair[side] and pair[side] | {"value": shortened(pair[side]["value"])}
        print_json(document)
    else:
        _print(found)


def _print(found: FileDifference) -> None:
    types = [[name, *_change(a, b)] for name, (a, b) in found.bytes_by_type().items()]
    print_table(["type", "A", "B", "B - A"], [*types, ["file", *_change(found.first.size, found.second.size)]])
    if found.metadata:
        print()
        rows = [[pair.key, _value(pair.first), _value(pair.second)] for pair in found.metadata]
        print_table(["metadata key", "A", "B"], rows)
    unlike = [pair for pair in found.tensors if not pair.is_equal]
    if unlike:
        print()
        rows = [[pair.name, pair.role, *_forms(pair.first, pair.second, pair.relative_difference)] for pair in unlike]
        print_table(["tensor", "role", "A", "B", "B - A", "relative difference"], rows)
    print_lines(f"\n{len(found.tensors) - len(unlike)} of {len(found.tensors)} tensors are the same in both files")
    if found.divergence is not None:
        print()
        _print_divergence(found.divergence)


def _print_divergence(directions: Directions) -> None:
    rows = []
    for name, report in (("KL(A || B)", directions.first_to_second), ("KL(B || A)", directions.second_to_first)):
        kld, top = report.metrics.kld, report.metrics.top1
        error = "" if kld.se is None else f" ± {kld.se:.1g}"
        rows.append([name, f"{kld.mean:.5f}{error}", f"{kld.p99:.4f}", f"{kld.max:.3g}", f"{100 * top.mean:.2f} %"])
    print_table(["nats a token", "mean", "99th percentile", "largest", "same top token"], rows)
    metrics = directions.first_to_second.metrics
    print_lines(f"\nperplexity {metrics.ppl.reference:.4f} of A, {metrics.ppl.model:.4f} of B")


def _change(a: int, b: int) -> list[str]:
    return [f"{a:,}", f"{b:,}", f"{b - a:+,}"]


def _forms(first: TensorForm | None, second: TensorForm | None, distance: float | None) -> list[str]:
    """Types of both with the shape where it differs, bytes that the second takes more, and how far they are apart."""
    is_alike = first is None or second is None or first.shape == second.shape
    cells = [
        "" if each is None else each.format if is_alike else f"{each.format} {' x '.join(map(str, each.shape))}"
        for each in (first, second)
    ]
    nbytes = [0 if each is None else each.nbytes for each in (first, second)]
    return [*cells, f"{nbytes[1] - nbytes[0]:+,}", "" if distance is None else f"{distance:.5f}"]


def _value(value: Value | None) -> str:
    if value is None:
        return ""
    shown: Any = shortened(value.value)
    return str(shown)[:60]
