"""The whole job: a source -> quantized files, measured against full precision, with a report and checksums.

Everything is made in a hidden folder inside the target and moved into place at the end. An interrupt before that
changes nothing that was there, and one meanwhile waits until all files are in place. What an interrupted or killed run
had finished, the next one takes up if it is asked for the same, and the files are the same to the last byte; all else
that was left behind it removes. The full-precision reference lives only as long as the evaluation needs it, in a folder
of its own that goes when the run ends, however it ends.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketquant import __version__
from pocketquant.errors import OutputError, listing
from pocketquant.files.finished import Finished, unfinished_work
from pocketquant.files.interrupts import put_in_place
from pocketquant.files.replacing import check_target
from pocketquant.files.unchanged import check_unchanged
from pocketquant.gguf_file.identity import identify
from pocketquant.gguf_file.shards import split_file, split_plan
from pocketquant.gguf_file.writing import Run
from pocketquant.quant import read_importance
from pocketquant.release.keys import keys_of
from pocketquant.release.measuring import (
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
from pocketquant.release.planning import (
    DEFAULT_RECIPES,
    Calibrating,
    Release,
    Settings,
    calibration_text,
    plan_again,
    plan_release,
)

SCHEMA = "pocketquant.make/1"
FOLDER = ".making"
"""Inside the target: where files are until all are finished."""

__all__ = ["DEFAULT_RECIPES", "Bars", "Settings", "calibration_text", "make_release", "plan_release", "to_markdown"]


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
    keys = keys_of(release)
    with _making(out) as (folder, passing):
        done = Finished(folder)
        wanted = [
            *zip(keys.variants, release.variants, strict=True),
            *zip(keys.sidecars, release.sidecars, strict=True),
        ]
        named = [(key, variant.name) for key, variant in wanted]
        named += [(keys.importance, release.calibrating.name)] if release.calibrating else []
        state = folder / f"{keys.importance}.unfinished"
        done.forget_all_but(named, state)
        _check_space(folder, release.disk_bytes - sum(done.nbytes(*one) for one in named))
        reference = passing / release.reference.name
        n_measured = len(release.variants)
        needed = [key for key, _ in wanted[:n_measured]] + ([keys.importance] if release.calibrating else [])
        if not all(done.has(key) for key in needed):
            write_variant(release.reference, reference, means, "reference")
        importance = describe_importance(release, None)
        if made := release.calibrating:
            release, importance = _calibrated(release, made, keys.importance, done, reference, means, state)
        measured = []
        for key, variant in zip(keys.variants, release.variants, strict=True):
            if not done.has(key):
                write_variant(variant, folder / variant.name, means)
                entry = measure_variant(release, variant, folder / variant.name, reference, means)
                done.keep(key, variant.name, entry)
            measured.append(done.entry(key))
        reference.unlink(missing_ok=True)
        for key, sidecar in zip(keys.sidecars, release.sidecars, strict=True):
            if not done.has(key):
                write_variant(sidecar, folder / sidecar.name, means)
                done.keep(key, sidecar.name, {})
        result = {
            "schema": SCHEMA,
            "version": __version__,
            "source": describe_source(release),
            "reference": release.reference.recipe,
            "importance": importance,
            "command": list(command),
            "sidecars": [
                {"recipe": item.recipe, "file": item.name, "file_bytes": item.plan.file_bytes}
                for item in release.sidecars
            ],
            "variants": measured,
        }
        _put_all_in_place(release, result, folder, out)
    return result


def _calibrated(
    release: Release, made: Calibrating, key: str, done: Finished, reference: Path, means: Means, state: Path
) -> tuple[Release, dict[str, Any] | None]:
    """The release planned with its importance matrix, and what the report says of that; made unless it is there."""
    if done.has(key):
        importance = replace(read_importance(done.folder / made.name), file=made.name)
        return plan_again(release, importance), done.entry(key)
    release, calibration = calibrate(release, reference, done.folder, means, state)
    described = describe_importance(release, calibration)
    done.keep(key, made.name, described)
    return release, described


def _put_all_in_place(release: Release, result: dict[str, Any], folder: Path, out: Path) -> None:
    reports = write_reports(result, folder)
    made = [release.calibrating.name] if release.calibrating else []
    files = [*release.variants, *release.sidecars]
    kept = [name for variant in files for name in _split(folder / variant.name, release.settings.split_bytes)]
    names = [*kept, *made, *reports]
    sums = "".join(f"{identify(folder / name).sha256}  {name}\n" for name in names)
    (folder / "SHA256SUMS").write_text(sums, encoding="utf-8")
    check_unchanged(state for variant in files for state in variant.plan.files)
    put_in_place([(folder / name, out / name) for name in [*names, "SHA256SUMS"]])


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
    files = [path for each in kept for _, path in split_plan(each.plan, out / each.name, release.settings.split_bytes)]
    names = [*([release.calibrating.name] if release.calibrating else []), *REPORTS, "SHA256SUMS"]
    files += [out / name for name in names]
    links = [str(path) for path in files if path.is_symlink()]
    if links:
        raise OutputError(f"links where files will be written; remove them, or write elsewhere:\n{listing(links)}")
    for path in files:
        check_target(path)
    return files


@contextmanager
def _making(out: Path) -> Iterator[tuple[Path, Path]]:
    """The folders of `unfinished_work`; after an interrupt what is finished stays in the first one, if anything."""
    with unfinished_work(out, FOLDER) as (folder, passing):
        try:
            yield folder, passing
        except BaseException as error:
            # an interrupt, or a disk that is full: the same command can end well; else it fails again
            if not isinstance(error, Exception) or isinstance(error, OutputError | OSError):
                Finished(folder).tidy()
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            f"{folder.parent}: needs {needed_bytes:,} bytes of disk while it runs and {free:,} are left; free some "
            "space or write elsewhere"
        )
