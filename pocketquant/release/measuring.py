"""The work of make and sweep: writes planned files, makes their importance matrix, measures what each file lost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocketquant.calibration.imatrix import collect_importance
from pocketquant.calibration.importance import importance_of, write_sums
from pocketquant.eval import compare, weight_errors
from pocketquant.eval.report.html import to_card, to_html, to_sheet
from pocketquant.files.replacing import replacing_together
from pocketquant.gguf_file.identity import identify
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.writing import write
from pocketquant.release.means import Means
from pocketquant.release.planning import Release, Variant, plan_again
from pocketquant.texts.calibration import SELF, CalibrationSettings
from pocketquant.texts.corpus import Corpus

CALIBRATION_CHUNKS = 128
"""Windows of calibration text, unless told otherwise: more change little, and every one costs time."""

REPORTS = ("report.json", "report.md", "report.html")
"""What `write_reports` writes."""


def write_variant(variant: Variant, path: Path, means: Means, label: str | None = None) -> None:
    """Writes a planned file, with a bar; it is not yet where the user will find it."""
    total = sum(item.nbytes for item in variant.plan.tensors)
    with means.bars.bytes(label or variant.name, total) as advance:
        write(variant.plan, path, threads=means.threads, on_bytes=advance, run=means.run, is_result=False)


def step_labels(release: Release) -> list[str]:
    """What the bars of making a release are called, in the order of the work."""
    labels = ["reference"]
    if release.calibrating is not None:
        labels += [*(["reference block"] if release.reference_block else []), "calibrate"]
    for variant in release.variants:
        labels += [variant.name, f"evaluate {variant.recipe}"]
    return [*labels, *(sidecar.name for sidecar in release.sidecars)]


def make_importance(
    release: Release, reference: Path, folder: Path, means: Means, state: Path | None = None
) -> tuple[Release, Corpus]:
    """Makes the importance matrix in `folder`, and plans every file again with it.

    Unfinished sums are kept in `state`, and taken up from there. The multi-token-prediction block's part of the matrix
    needs the block in full precision; that file lies beside the reference and is gone afterwards.
    """
    calibrating = release.calibrating
    assert calibrating is not None
    is_written = calibrating.text == SELF
    block = None
    if release.reference_block:
        block = reference.with_name(release.reference_block.name)
        write_variant(release.reference_block, block, means, "reference block")
    with means.bars.steps("calibrate") as advance:
        sums, calibration = collect_importance(
            reference,
            calibrating.text,
            CalibrationSettings(
                release.settings.context,
                calibrating.chunks or (None if is_written else CALIBRATION_CHUNKS),
                means.threads,
                means.gpu_layers,
            ),
            mtp=block,
            state=state,
            resume=True,
            progress=advance,
        )
    if block:
        block.unlink()
    write_sums(sums, folder / calibrating.name, is_result=False)
    if state:
        state.unlink(missing_ok=True)
    return plan_again(release, importance_of(sums, calibrating.name)), calibration


def measure_variant(release: Release, variant: Variant, path: Path, reference: Path, means: Means) -> dict[str, Any]:
    """One entry of a report's variants: what a written file lost on the texts, and what each of its tensors lost."""
    with means.bars.steps(f"evaluate {variant.recipe}") as advance:
        report = compare(
            path,
            reference,
            release.settings.texts,
            context=release.settings.context,
            chunks=release.settings.chunks,
            threads=means.threads,
            gpu_layers=means.gpu_layers,
            positions=release.settings.positions,
            progress=advance,
        )
    errors = weight_errors(open_gguf(path), release.model)
    rounding = variant.plan.metadata.get("pocketquant.rounding")  # by statistics
    return {
        "recipe": variant.recipe,
        "file": variant.name,
        "file_bytes": variant.plan.file_bytes,
        "bits_per_weight": variant.plan.bits_per_weight,
        "rounding": rounding.value if rounding else None,
        "evaluation": report.to_json(),
        "weights": [asdict(error) | {"role": error.role.value} for error in errors],
    }


def describe_source(release: Release) -> dict[str, Any]:
    """The source in a report. A repository's files are not here to be digested; its name and revision stand in
    `given`."""
    source = Path(release.source)
    files = [source] if source.is_file() else sorted([*source.glob("*.json"), *source.glob("*.safetensors")])
    return {
        "name": release.name,
        "given": source.name if source.exists() else release.source,
        "n_weights": release.model.n_weights,
        "notes": list(release.model.notes),
        "files": [asdict(identify(path)) for path in files],
    }


def describe_importance(release: Release, calibration: Corpus | None) -> dict[str, Any] | None:
    """Where the importance came from; None if there was none."""
    importance = release.importance
    if importance is None:
        return None
    described = {"file": importance.file, "datasets": list(importance.datasets), "entries": len(importance.weights)}
    if calibration is None or release.calibrating is None:
        return described | {"windows": importance.n_chunks}
    text = release.calibrating.text
    return described | {
        "windows": len(calibration.windows),
        "context": release.settings.context,
        "tokens": calibration.windows.size,
        "tokens_sha256": calibration.sha256,
        "text": None if text == SELF else asdict(identify(text)),
    }


def write_reports(result: dict[str, Any], folder: Path) -> list[str]:
    """report.json and the same for people, in Markdown and HTML, all of one run; gives their names.

    Raises:
        OutputError: they cannot be written; those of an earlier run stay.
    """
    sheet = to_sheet([("report.json", result)])
    pages = [json.dumps(result, indent=2, ensure_ascii=False) + "\n", to_card(sheet), to_html(sheet)]
    with replacing_together([folder / name for name in REPORTS]) as temporaries:
        for temporary, page in zip(temporaries, pages, strict=True):
            temporary.write_text(page, encoding="utf-8")
    return list(REPORTS)


def to_markdown(result: dict[str, Any]) -> str:
    """report.json's content in short, for a terminal."""
    return to_card(to_sheet([("report.json", result)]), brief=True)
