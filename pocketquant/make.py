"""The whole job: a source -> quantized files, measured against full precision, with a report and checksums.

Everything is made in a hidden folder inside the target and moved into place at the end. An interrupt before that
changes nothing that was there, and one meanwhile waits until all files are in place; what a killed run left behind, the
next one removes. The full-precision reference lives only as long as the evaluation needs it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pocketquant.errors import OutputError, listing
from pocketquant.eval.report import identify
from pocketquant.files import check_target
from pocketquant.interrupts import put_in_place
from pocketquant.leftovers import FOLDER_LOCK, make_held_file, remove_leftovers
from pocketquant.measure import (
    REPORTS,
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
from pocketquant.splits import split_file, split_plan

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
        OutputError: the folder cannot be written, the disk is too small, or no file can take the place of what stands
            at one of the names.
        EvalError: the files cannot be evaluated; nothing in `out` has changed.
    """
    out, means = Path(out), Means(threads, gpu_layers, bars or Bars(), run)
    list_outputs(release, out)
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
        put_in_place([(staging / name, out / name) for name in [*names, "SHA256SUMS"]])
    return result


def _split(path: Path, max_bytes: int | None) -> list[str]:
    """Names of the files that a finished one is kept as: its own, or its shards'."""
    if max_bytes is None or path.stat().st_size <= max_bytes:
        return [path.name]
    shards = split_file(path, path, max_bytes)
    path.unlink()
    return [shard.name for shard in shards]


def list_outputs(release: Release, out: Path) -> list[Path]:
    """Every file that a release will be, in the folder `out`.

    Raises:
        OutputError: `out` is no folder, or something else than a regular file stands at one of the names: a link, too,
            since files move there by being renamed, which would leave what it leads to as it is.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is no folder; give the name of one")
    kept = [*release.variants, *release.sidecars]
    files = [path for each in kept for _, path in split_plan(each.plan, out / each.name, release.split_bytes)]
    names = [*([release.calibrating.name] if release.calibrating else []), *REPORTS, "SHA256SUMS"]
    files += [out / name for name in names]
    links = [str(path) for path in files if path.is_symlink()]
    if links:
        raise OutputError(f"links where files will be written; remove them, or write elsewhere:\n{listing(links)}")
    for path in files:
        check_target(path)
    return files


@contextmanager
def _staging(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A hidden folder inside `out`, gone when the block ends, whichever way; those that killed runs left go first."""
    made_out = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out, ".making-", FOLDER_LOCK)
        lock, descriptor = make_held_file(out, ".making-", FOLDER_LOCK)
        folder = lock.with_suffix("")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        folder.mkdir(mode=0o700)
        free = shutil.disk_usage(folder).free
        if free < needed_bytes:
            raise OutputError(
                f"{out}: needs {needed_bytes:,} bytes of disk while it runs and {free:,} are left; free some space or "
                "write elsewhere"
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)
        if made_out and not any(out.iterdir()):
            out.rmdir()
