"""All checks in their order, on a GGUF or on an opened checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from pocketquant.check.contents import Contents, contents_of_gguf, contents_of_model
from pocketquant.check.findings import ERROR, CheckReport, Comparison, Finding
from pocketquant.check.keys import compare_metadata
from pocketquant.check.metadata import check_metadata
from pocketquant.check.source import compare_tensors
from pocketquant.check.structure import check_structure
from pocketquant.check.tokenizer import check_chat_template, check_tokenizer
from pocketquant.check.vision import ARCHITECTURE as VISION
from pocketquant.check.vision import check_vision
from pocketquant.check.weights import check_weights
from pocketquant.gguf_file.reading import OTHER_KINDS
from pocketquant.model import Model

Progress = Callable[[int, int], None]


def check_gguf(path: Path | str, source: Model | None = None, *, progress: Progress | None = None) -> CheckReport:
    """Looks for everything that can be wrong with a GGUF and be seen without running it.

    Args:
        path: the file, of any architecture, or the first shard of a split one, which stands for all of it; what is not
            covered is said in the report.
        source: the opened checkpoint that it was made from, to compare every tensor with.
        progress: called with steps done and steps in all.

    Raises:
        SourceError: the header cannot be read, shards are missing or do not belong together, or the file or the source
            cannot be read to its end, or was changed meanwhile.
    """
    original = contents_of_model(source) if source else None
    return _check(contents_of_gguf(Path(path)), original, progress)


def check_model(model: Model, *, progress: Progress | None = None) -> CheckReport:
    """The same for an opened checkpoint, before anything is written: `open_model` has checked names and shapes."""
    return _check(contents_of_model(model), None, progress, model.notes)


def _check(
    contents: Contents, source: Contents | None, progress: Progress | None, noted: tuple[str, ...] = ()
) -> CheckReport:
    notes = list(noted)
    comparisons: list[Comparison] = []
    findings = list(check_header(contents, notes))
    n_tensors = len(contents.entries)
    total = n_tensors * (2 if source else 1)
    findings += check_weights(contents, (lambda done, _: progress(done, total)) if progress else None)
    if source is not None:
        findings += compare_metadata(contents, source, notes)
        advance = (lambda done, _: progress(n_tensors + done, total)) if progress else None
        findings += compare_tensors(contents, source, comparisons, notes, advance)
    findings.sort(key=lambda finding: finding.severity != ERROR)  # stable: the order of the checks within each
    described = {
        "architecture": contents.architecture,
        "tensors": n_tensors,
        "tensor_bytes": sum(entry.nbytes for entry in contents.entries.values()),
    }
    return CheckReport(tuple(findings), tuple(dict.fromkeys(notes)), tuple(comparisons), described)


def check_header(contents: Contents, notes: list[str]) -> Iterator[Finding]:
    """All that can be seen without reading numbers; what is not covered is added to the notes."""
    if contents.kind in OTHER_KINDS:
        notes.append(f"{OTHER_KINDS[contents.kind]}: only its numbers are looked at")
    elif contents.table is None and contents.architecture != VISION:
        notes.append(
            f"architecture {contents.architecture!r} is not known: tensor names, shapes and keys are not covered, only "
            "the numbers and the chat template"
        )
    if not contents.entries and contents.architecture != VISION:
        yield Finding(ERROR, "no-tensors", "", "the file holds no tensors", "make it again")
    yield from check_structure(contents)
    yield from check_metadata(contents)
    yield from check_tokenizer(contents)
    yield from check_chat_template(contents, notes)
    yield from check_vision(contents, notes)
