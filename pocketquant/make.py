"""The whole job: a source -> quantized files, measured against full precision, with a report and checksums.

Everything is made in a hidden folder inside the target and moved into place at the end, so an interrupted run changes
nothing that was there. The full-precision reference lives only as long as the evaluation needs it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocketquant.errors import OutputError
from pocketquant.eval.report import identify
from pocketquant.measure import (
    Bars,
    Means,
    calibrate,
    describe_importance,
    describe_source,
    measure_variant,
    to_markdown,
    write_reports,
    write_variant,
)
from pocketquant.pipeline import Run
from pocketquant.release import DEFAULT_RECIPES, Release, calibration_text, plan_release
from pocketquant.splits import split_file

SCHEMA = "pocketquant.make/1"

__all__ = ["DEFAULT_RECIPES", "Bars", "calibration_text", "make_release", "plan_release", "to_markdown"]


def make_release(
    release: Release,
    out: Path | str,
    *,
    threads: int | None = None,
    gpu_layers: int = 0,
    bars: Bars | None = None,
    run: Run | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Makes, measures and puts in place everything a release names.

    Args:
        release: from `plan_release`.
        out: folder for the files, report.json, report.md, report.html and SHA256SUMS; made if missing.
        threads: for encoding and evaluation.
        gpu_layers: for the evaluation.
        bars: progress bars.
        run: who encodes, as in `pipeline.write`.
        command: what does the same again, for the report.

    Returns:
        The content of report.json.

    Raises:
        OutputError: the folder cannot be written or the disk is too small.
        EvalError: the files cannot be evaluated; nothing in `out` has changed.
    """
    out, means = Path(out), Means(threads, gpu_layers, bars or Bars(), run)
    with _staging(out, release.disk_bytes) as staging:
        reference = staging / release.reference.name
        write_variant(release.reference, reference, means, "reference")
        calibration = None
        if release.calibrating:
            release, calibration = calibrate(release, reference, staging, means)
        measured = []
        for variant in release.variants:
            path = staging / variant.name
            write_variant(variant, path, means)
            measured.append(measure_variant(release, variant, path, reference, means))
        reference.unlink()
        for sidecar in release.sidecars:
            write_variant(sidecar, staging / sidecar.name, means)
        result = {
            "schema": SCHEMA,
            "source": describe_source(release),
            "reference": release.reference.recipe,
            "importance": describe_importance(release, calibration),
            "command": list(command),
            "sidecars": [
                {"recipe": item.recipe, "file": item.name, "file_bytes": item.plan.file_bytes}
                for item in release.sidecars
            ],
            "variants": measured,
        }
        reports = write_reports(result, staging)
        made = [release.calibrating.name] if release.calibrating else []
        files = [*release.variants, *release.sidecars]
        kept = [name for variant in files for name in _split(staging / variant.name, release.split_bytes)]
        names = [*kept, *made, *reports]
        sums = "".join(f"{identify(staging / name).sha256}  {name}\n" for name in names)
        (staging / "SHA256SUMS").write_text(sums, encoding="utf-8")
        for name in [*names, "SHA256SUMS"]:
            os.replace(staging / name, out / name)
    return result


def _split(path: Path, max_bytes: int | None) -> list[str]:
    """Names of the files that a finished one is kept as: its own, or its shards'."""
    if max_bytes is None or path.stat().st_size <= max_bytes:
        return [path.name]
    shards = split_file(path, path, max_bytes)
    path.unlink()
    return [shard.name for shard in shards]


class _staging:
    """A hidden folder inside `out`, gone when the block ends, whichever way."""

    def __init__(self, out: Path, needed_bytes: int) -> None:
        self.out, self.needed_bytes, self.made_out = out, needed_bytes, False

    def __enter__(self) -> Path:
        try:
            self.made_out = not self.out.exists()
            self.out.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=".making-", dir=self.out))
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be written: {error.strerror}") from error
        free = shutil.disk_usage(self.path).free
        if free < self.needed_bytes:
            self.__exit__()
            raise OutputError(
                f"{self.out}: needs {self.needed_bytes:,} bytes of disk while it runs and {free:,} are left; free some "
                "space or write elsewhere"
            )
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self.made_out and not any(self.out.iterdir()):
            self.out.rmdir()
