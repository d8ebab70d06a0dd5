"""How long a release will take on this machine: its reference is made, and the first steps of all else are tried."""

from __future__ import annotations

import time
from pathlib import Path

from pocketquant.calibration.imatrix import collect_importance
from pocketquant.eval.compare import compare
from pocketquant.files.leftovers import work_folder
from pocketquant.gguf_file.writing import write
from pocketquant.pace import Pace, Progress, try_out
from pocketquant.release.means import Means
from pocketquant.release.measuring import CALIBRATION_CHUNKS, step_labels
from pocketquant.release.planning import Release, Variant
from pocketquant.texts.calibration import CalibrationSettings

PIECES = 8
"""Pieces of a file's bytes whose pace is taken, of a hundred."""


def try_release(release: Release, out: Path, means: Means) -> dict[str, float]:
    """Seconds that each step of a release will take, by its label.

    The evaluation is tried with the reference against itself, which is at least as slow as a quantized file against
    it. The parts of a file are taken for equally slow; sidecars, for as slow as the first file.

    Args:
        release: from `plan_release`.
        out: the folder that it will be made in; what the trial writes stands in it for a while, or beside
            its place where there is none yet.
        means: threads and layers on a GPU.
    """
    settings = release.settings
    seconds: dict[str, float] = {}
    place = out.resolve()
    with work_folder(place / "trial" if place.is_dir() else place) as folder:
        reference, started = folder / "reference.gguf", time.monotonic()
        write(release.reference.plan, reference, threads=means.threads, is_result=False)
        seconds["reference"] = time.monotonic() - started

        def evaluate(progress: Progress) -> None:
            compare(
                reference,
                reference,
                settings.texts,
                context=settings.context,
                chunks=settings.chunks,
                threads=means.threads,
                gpu_layers=means.gpu_layers,
                positions=settings.positions,
                progress=progress,
            )

        evaluation = try_out(evaluate).seconds
        if release.calibrating is not None:
            seconds["calibrate"] = _try_calibration(release, reference, folder, means).seconds
        for variant in release.variants:
            seconds[variant.name] = _try_writing(variant, folder, means).seconds
            seconds[f"evaluate {variant.recipe}"] = evaluation
    per_byte = seconds[release.variants[0].name] / release.variants[0].plan.file_bytes
    seconds |= {each.name: per_byte * each.plan.file_bytes for each in release.sidecars}
    if release.reference_block is not None:
        seconds["reference block"] = per_byte * release.reference_block.plan.file_bytes
    return {label: seconds[label] for label in step_labels(release)}


def _try_calibration(release: Release, reference: Path, folder: Path, means: Means) -> Pace:
    calibrating = release.calibrating
    assert calibrating is not None

    def collect(progress: Progress) -> None:
        collect_importance(
            reference,
            calibrating.text,
            CalibrationSettings(
                release.settings.context,
                calibrating.chunks or CALIBRATION_CHUNKS,
                means.threads,
                means.gpu_layers,
            ),
            state=folder / "state",
            progress=progress,
        )

    return try_out(collect)


def _try_writing(variant: Variant, folder: Path, means: Means) -> Pace:
    """The pace of encoding, counted in hundredths of the file."""
    total = sum(item.nbytes for item in variant.plan.tensors)

    def encode(progress: Progress) -> None:
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            before, done = done, done + nbytes
            if 100 * done // total > 100 * before // total:
                progress(100 * done // total, 100)

        write(variant.plan, folder / "trial.gguf", threads=means.threads, on_bytes=count, is_result=False)

    return try_out(encode, most=PIECES)
