"""What the commands do, as functions: each takes paths and settings, and gives a frozen result.

`convert_source` and `check_file` are the commands `convert` and `check`, whose names are packages of their own here.
Everything raises a `PocketquantError` that says what is wrong, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketquant.calibration.collecting import Collection, CollectSettings
from pocketquant.errors import RecipeError
from pocketquant.release.means import Bars, Means
from pocketquant.release.outputs import Opening, Output
from pocketquant.release.planning import DEFAULT_RECIPES, ReleaseSettings

if TYPE_CHECKING:
    from pocketquant.calibration.statistics import Statistics
    from pocketquant.check import CheckReport
    from pocketquant.eval.gate.verdict import Verdict
    from pocketquant.eval.report.html.sheet import Sheet
    from pocketquant.eval.report.schema import Report
    from pocketquant.quant import Choice, Importance, Recipe
    from pocketquant.texts.corpus import Text

__all__ = [
    "Bars",
    "CollectSettings",
    "EvalSettings",
    "Made",
    "MadeFile",
    "Means",
    "Opening",
    "Output",
    "ReleaseSettings",
    "calibrate",
    "check_file",
    "convert_source",
    "evaluate",
    "gate",
    "imatrix",
    "make",
    "quantize",
    "report",
]


@dataclass(frozen=True)
class MadeFile:
    """One measured file of `make`.

    Attributes:
        recipe: the name of its recipe.
        path: where it is; where the first shard is, if it was split.
        kld: mean KL divergence from full precision, nats a token, over all texts.
        same_top: share of the scored tokens whose most likely next token is the same, 0 to 1.
        perplexity_ratio: its perplexity divided by that of full precision.
    """

    recipe: str
    path: Path
    file_bytes: int
    bits_per_weight: float
    kld: float
    same_top: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Made:
    """What `make` put in place.

    Attributes:
        folder: holds the files, report.json, report.md, report.html and SHA256SUMS.
        files: those that were measured, in the order of the choices.
        report: the content of report.json.
    """

    folder: Path
    files: tuple[MadeFile, ...]
    report: Mapping[str, Any]


@dataclass(frozen=True)
class EvalSettings:
    """How `evaluate` measures.

    Attributes:
        context: tokens in a window; the second half of each is scored.
        chunks: the most windows of each text to score; None for all.
        positions: score the first half of each window too, for the numbers by position.
        noise_floor: run the file against itself at another batch size, too.
        like: "llama-perplexity" to round what that program rounds.
        seed: of the bootstrap behind the standard errors.
        head: the GGUF that a reference pack was made from; None to look beside the pack.
    """

    context: int = 512
    chunks: int | None = None
    positions: bool = False
    noise_floor: bool = False
    like: str | None = None
    seed: int = 0
    head: Path | None = None


def make(
    source: Path | str,
    out: Path | str,
    choices: Sequence[Choice | Recipe | str] = DEFAULT_RECIPES,
    settings: ReleaseSettings | None = None,
    *,
    opening: Opening | None = None,
    means: Means | None = None,
) -> Made:
    """Does the whole job: quantized files, what each lost against full precision, report and checksums.

    Args:
        source: as for `open_model`.
        out: the folder; an interrupted run goes on there if it is asked for the same again.
        choices: what decides each file; a recipe, or its name, stands for a choice that says nothing else.
        settings: texts, importance matrix, reference, sizes of shards.
        opening: how the source is opened.
        means: threads, progress bars, who encodes.

    Raises:
        PocketquantError: see `plan_release` and `make_release`; nothing in `out` has changed.
    """
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.release.make import list_outputs, make_release
    from pocketquant.release.planning import plan_release

    means, out = means or Means(), Path(out)
    parts = (opening or Opening()).open(source)
    with means.bars.steps("predicting") as advance:
        release = plan_release(source, choices, settings, parts=parts, progress=advance)
    read = [source, *(text.path for text in release.settings.texts)]
    read += _files_of([variant.choice for variant in release.variants])
    refuse_overwriting(list_outputs(release, out), read, makes_folder=True)
    done = make_release(release, out, **vars(means))
    return Made(out, tuple(_made_file(entry, out) for entry in done["variants"]), done)


def _files_of(choices: Sequence[Choice]) -> list[Path]:
    """The statistics that files are rounded by, which are read while they are written."""
    return [choice.statistics.path for choice in choices if choice.statistics is not None]


def _made_file(entry: Mapping[str, Any], out: Path) -> MadeFile:
    metrics, path = entry["evaluation"]["metrics"], out / entry["file"]
    if not path.exists():
        path = next(out.glob(f"{path.stem}-00001-of-*.gguf"))
    return MadeFile(
        entry["recipe"],
        path,
        entry["file_bytes"],
        entry["bits_per_weight"],
        metrics["kld"]["mean"],
        metrics["top1"]["mean"],
        metrics["ppl"]["ratio"],
    )


def quantize(
    source: Path | str,
    out: Path | str,
    choice: Choice | Recipe | str = "pocket_4bit",
    *,
    opening: Opening | None = None,
    mmproj: str | None = None,
    split_bytes: int | None = None,
    means: Means | None = None,
) -> tuple[Output, ...]:
    """Quantizes a checkpoint in one pass, or a GGUF in full precision.

    Args:
        source: as for `open_model`.
        out: path of the model's file; `mmproj-NAME` and `mtp-NAME` lie beside it, where the source has such parts.
        choice: what decides the types and the rounding.
        opening: how the source is opened.
        mmproj: recipe of the vision tower; None for the one that goes with the choice's, "none" for no tower.
        split_bytes: the largest file; None for no limit.
        means: threads, progress bars, who encodes.

    Returns:
        The files with their plans, the model's first. `plan.allocation` says how near a size that was asked for came.

    Raises:
        PocketquantError: see `plan` and `write`; no file was replaced.
    """
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.quant.choosing import as_choice
    from pocketquant.release.outputs import all_files, plan_outputs, write_outputs

    opening, chosen, means = opening or Opening(), as_choice(choice), means or Means()
    outputs = plan_outputs(opening.open(source), Path(out), chosen, mmproj, split_bytes)
    read = [source, opening.chat_template, opening.adapter, *_files_of([chosen])]
    refuse_overwriting([path for _, path in all_files(outputs)], read)
    write_outputs(outputs, means)
    return outputs


def convert_source(
    source: Path | str,
    out: Path | str,
    type: str = "bf16",
    *,
    opening: Opening | None = None,
    split_bytes: int | None = None,
    means: Means | None = None,
) -> tuple[Output, ...]:
    """Converts a checkpoint to a GGUF in full precision: "bf16", "f16" or "f32". Arguments and result as `quantize`."""
    if type not in ("bf16", "f16", "f32"):
        raise RecipeError(f"{type}: bf16, f16 or f32 are full precision; for smaller types take quantize")
    return quantize(source, out, type, opening=opening, split_bytes=split_bytes, means=means)


def evaluate(
    model: Path | str,
    reference: Path | str,
    texts: Path | str | Sequence[Text | Path | str],
    settings: EvalSettings | None = None,
    *,
    means: Means | None = None,
) -> Report:
    """Measures how far a GGUF is from full precision on texts.

    Args:
        model: the GGUF to judge.
        reference: the same checkpoint in full precision as a GGUF or as its folder, or a reference pack.
        texts: a file, or what each of several FILE, NAME=FILE and "domains" stands for.
        settings: how.
        means: threads, progress bars.

    Raises:
        SourceError, EvalError: see `compare`.
    """
    from pocketquant.eval import compare
    from pocketquant.eval.reference import open_reference
    from pocketquant.texts.embedded import read_texts

    how, means = settings or EvalSettings(), means or Means()
    given = [str(texts)] if isinstance(texts, str | Path) else texts
    named = [each for text in given for each in (read_texts([str(text)]) if isinstance(text, str | Path) else [text])]
    with means.bars.steps(Path(model).name) as advance:
        return compare(
            model,
            reference,
            named,
            context=how.context,
            chunks=how.chunks,
            threads=means.threads,
            gpu_layers=means.gpu_layers,
            seed=how.seed,
            positions=how.positions,
            noise_floor=how.noise_floor,
            like=how.like,
            progress=advance,
            reference_opener=partial(open_reference, head=how.head),
        )


def imatrix(
    source: Path | str,
    text: Path | str,
    out: Path | str,
    settings: CollectSettings | None = None,
    *,
    means: Means | None = None,
) -> Importance:
    """Makes an importance matrix, llama.cpp's GGUF format, and reads it: for a `Choice`.

    Args:
        source: the model in full precision: a GGUF, or a checkpoint, which is converted for the run.
        text: UTF-8 text or conversations in `.jsonl`; "self" for one that the model writes.
        out: the file to write.
        settings: how the model is run.
        means: threads, progress bars.

    Raises:
        SourceError, EvalError: see `collect_importance`.
    """
    from pocketquant.calibration.imatrix import collect_importance, unfinished_matrix
    from pocketquant.calibration.importance import read_importance, write_sums
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.release.outputs import as_gguf
    from pocketquant.texts.calibration import CalibrationSettings

    how, means, out = settings or CollectSettings(), means or Means(), Path(out)
    refuse_overwriting([out], [source, text])
    with unfinished_matrix(out) as state, as_gguf(source, out, how.reference_type, means) as gguf:
        with means.bars.steps(out.name) as advance:
            sums, _ = collect_importance(
                gguf,
                text,
                CalibrationSettings(how.context, how.chunks, means.threads, means.gpu_layers, how.seed),
                state=state,
                resume=how.resume,
                progress=advance,
            )
        write_sums(sums, out)
    return read_importance(out)


def calibrate(
    source: Path | str,
    texts: Sequence[Path | str],
    out: Path | str,
    settings: CollectSettings | None = None,
    *,
    means: Means | None = None,
) -> Statistics:
    """Collects the statistics of a model on texts, and opens them: for a `Choice`.

    Args:
        source: the model in full precision: a GGUF, or a checkpoint, which is converted for the run.
        texts: UTF-8 texts; "self" for one that the model writes.
        out: the file to write.
        settings: how the model is run.
        means: threads, progress bars.

    Raises:
        SourceError, EvalError: see `Collection.write`.
    """
    from pocketquant.calibration.statistics import open_statistics
    from pocketquant.files.leftovers import holding
    from pocketquant.files.replacing import check_target, refuse_overwriting
    from pocketquant.release.outputs import as_gguf

    how, means, out = settings or CollectSettings(), means or Means(), Path(out)
    if how.curvature:
        from pocketquant.calibration.torch_layers import require_torch

        require_torch()  # before hours of work
    refuse_overwriting([out], [source, *texts])
    with holding(check_target(out)), as_gguf(source, out, how.reference_type, means) as gguf:
        Collection(gguf, texts, how, means.bars.steps, means.threads, means.gpu_layers).write(out)
    return open_statistics(out)


def check_file(file: Path | str, source: Path | str | None = None) -> CheckReport:
    """Looks for all that can be wrong with a GGUF, or with a checkpoint before it is converted, without running it.

    Args:
        file: a GGUF, or a checkpoint as for `open_model`.
        source: what a GGUF was made from, to compare every tensor with.

    Raises:
        SourceError: the file cannot be read, or only a GGUF could be compared with a source.
        ArchitectureError, TokenizerError: a checkpoint that cannot be converted.
    """
    from pocketquant.check import check_gguf, check_model
    from pocketquant.convert.sources import names_gguf, open_counterpart, open_model
    from pocketquant.errors import SourceError

    if names_gguf(file):
        return check_gguf(file, open_counterpart(file, source) if source else None)
    if source is not None:
        raise SourceError(f"{file}: only a GGUF file can be compared with a source")
    return check_model(open_model(file))


def gate(
    report: Path | str,
    limits: Path | str,
    baseline: Path | str | None = None,
    *,
    file: str | None = None,
    strict: bool = False,
    first: bool = False,
) -> Verdict:
    """Holds a report against limits, and against the report of the last accepted file.

    Args:
        report: what `eval --json` printed, or report.json of `make` and `sweep`.
        limits: TOML with the limits.
        baseline: the report of the last accepted file.
        file: which file is meant, where a report holds several.
        strict: a limit that the text is too short to decide fails, too.
        first: nothing was accepted yet: the limits in [baseline] are left out.

    Raises:
        SourceError, EvalError: see `read_report`, `read_limits` and `decide`.
    """
    from pocketquant.eval.gate.decide import decide, read_report
    from pocketquant.eval.gate.limits import read_limits
    from pocketquant.eval.report.reading import RELEASES
    from pocketquant.files.small import read_json

    accepted = None
    if baseline is not None:
        document = read_json(Path(baseline))
        holds_several = isinstance(document, dict) and document.get("schema") in RELEASES
        accepted = read_report(Path(baseline), file if holds_several else None)
    return decide(read_report(Path(report), file), read_limits(Path(limits)), accepted, strict=strict, first=first)


def report(reports: Sequence[Path | str], out: Path | str, markdown: Path | str | None = None) -> Sheet:
    """Writes measurements as a page, and gives what it shows.

    Args:
        reports: what `eval --json`, `make`, `sweep` and `tasks --json` wrote.
        out: the HTML page.
        markdown: the same in Markdown, for a model card; None for no such file.

    Raises:
        SourceError, EvalError: a report cannot be read or is something else.
        OutputError: a page cannot be written; none was replaced.
    """
    from pocketquant.eval.report.html import read_sheet, to_card, to_html
    from pocketquant.files.replacing import refuse_overwriting, replacing_together

    sources, targets = [Path(each) for each in reports], [Path(each) for each in (out, markdown) if each is not None]
    refuse_overwriting(targets, sources)
    sheet = read_sheet(sources)
    pages = [to_html(sheet), to_card(sheet)]
    with replacing_together(targets) as temporaries:
        for temporary, page in zip(temporaries, pages, strict=False):
            temporary.write_text(page, encoding="utf-8")
    return sheet
