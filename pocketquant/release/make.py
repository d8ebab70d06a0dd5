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
from pocketquant.release.keys import Keys, keys_of
from pocketquant.release.means import Bars, Means
from pocketquant.release.measuring import (
    REPORTS,
    describe_importance,
    describe_source,
    make_importance,
    measure_variant,
    write_reports,
    write_variant,
)
from pocketquant.release.planning import Calibrating, Release, plan_again

SCHEMA = "pocketquant.make/1"
FOLDER = ".making"
"""Inside the target: where files are until all are finished."""


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
        _take_up(release, keys, done)
        release, importance = _make_files(release, keys, done, passing, means)
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
            "variants": [done.entry(key) for key in keys.variants],
        }
        _put_all_in_place(release, result, folder, out)
    return result


def _take_up(release: Release, keys: Keys, done: Finished) -> None:
    """Finds what an earlier run had finished, removes all else, and checks that there is room for the rest."""
    named = list(zip(keys.variants, (variant.name for variant in release.variants), strict=True))
    named += zip(keys.sidecars, (sidecar.name for sidecar in release.sidecars), strict=True)
    named += [(keys.importance, release.calibrating.name)] if release.calibrating else []
    done.forget_all_but(named, _state(keys, done))
    _check_space(done.folder, release.disk_bytes - sum(done.nbytes(*one) for one in named))


def _state(keys: Keys, done: Finished) -> Path:
    """Where the sums of an unfinished importance matrix are."""
    return done.folder / f"{keys.importance}.unfinished"


def _make_files(
    release: Release, keys: Keys, done: Finished, passing: Path, means: Means
) -> tuple[Release, dict[str, Any] | None]:
    """Makes and measures all that is not finished; gives the release as it was planned last, and what the report says
    of its importance matrix. The reference lies in the folder `passing`, which goes when the run ends.
    """
    folder, reference = done.folder, passing / release.reference.name
    needed = [*keys.variants, *([keys.importance] if release.calibrating else [])]
    if not all(done.has(key) for key in needed):
        write_variant(release.reference, reference, means, "reference")
    importance = describe_importance(release, None)
    if release.calibrating:
        release, importance = _with_importance(release, release.calibrating, keys, done, reference, means)
    for key, variant in zip(keys.variants, release.variants, strict=True):
        if not done.has(key):
            write_variant(variant, folder / variant.name, means)
            done.keep(key, variant.name, measure_variant(release, variant, folder / variant.name, reference, means))
    reference.unlink(missing_ok=True)
    for key, sidecar in zip(keys.sidecars, release.sidecars, strict=True):
        if not done.has(key):
            write_variant(sidecar, folder / sidecar.name, means)
            done.keep(key, sidecar.name, {})
    return release, importance


def _with_importance(
    release: Release, made: Calibrating, keys: Keys, done: Finished, reference: Path, means: Means
) -> tuple[Release, dict[str, Any] | None]:
    """The release planned with its importance matrix, and what the report says of that; made unless it is there."""
    key = keys.importance
    if done.has(key):
        importance = replace(read_importance(done.folder / made.name), file=made.name)
        return plan_again(release, importance), done.entry(key)
    release, calibration = make_importance(release, reference, done.folder, means, _state(keys, done))
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
