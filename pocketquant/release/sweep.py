"""Several recipes or sizes of one source, measured against one reference: which of them are worth their bytes.

The reference runs once: what it says is kept as a reference pack, and its file is gone before the first variant is
made, so no two large models are in memory together. Every finished measurement is kept in `OUT/.sweep`, under a digest
of everything that it depends on; a sweep that was interrupted, or is run again with more recipes, measures only what is
missing. Files are deleted as soon as another one is no larger and loses less.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketquant import __version__
from pocketquant.errors import OutputError, SourceError
from pocketquant.eval.reference import PackSettings, make_reference
from pocketquant.eval.report.html.sheet import find_front
from pocketquant.files.finished import unfinished_work
from pocketquant.files.interrupts import put_in_place
from pocketquant.files.replacing import replacing
from pocketquant.files.small import read_json
from pocketquant.gguf_file.identity import identify
from pocketquant.quant import read_importance
from pocketquant.release.keys import keys_of
from pocketquant.release.means import Means
from pocketquant.release.measuring import (
    describe_importance,
    describe_source,
    make_importance,
    measure_variant,
    write_reports,
    write_variant,
)
from pocketquant.release.planning import Release, Variant, plan_again

SCHEMA = "pocketquant.sweep/1"
KEEP = ("front", "all", "none")
"""Which files stay: those that no other one beats, all, none."""

_FOLDER = ".sweep"


@dataclass(frozen=True)
class Sweep:
    """What will be measured, decided.

    Attributes:
        keys: for each variant of the release, the digest of all that its measurement depends on.
        reference_key: the same for the reference pack.
        importance_key: the same for the importance matrix; "" where none is made.
        pack: a reference pack that was given.
        keep: one of `KEEP`.
    """

    release: Release
    keys: tuple[str, ...]
    reference_key: str
    importance_key: str
    pack: Path | None
    keep: str

    def missing(self, out: Path) -> list[Variant]:
        """The variants that have not been measured yet."""
        pairs = zip(self.release.variants, self.keys, strict=True)
        return [variant for variant, key in pairs if _read(out / _FOLDER, key) is None]

    @property
    def disk_bytes(self) -> int:
        """Free disk the whole sweep needs at most, without the reference pack's hidden states."""
        sizes = [variant.plan.file_bytes for variant in self.release.variants]
        return self.release.reference_bytes + (max(sizes) if self.keep == "none" else sum(sizes))

    @property
    def memory_bytes(self) -> int:
        """Memory for the largest model that runs, without caches."""
        sizes = [variant.plan.file_bytes for variant in self.release.variants]
        needs_reference = self.pack is None or self.release.calibrating is not None
        return max([*sizes, *([self.release.reference.plan.file_bytes] if needs_reference else [])])


def plan_sweep(release: Release, *, pack: Path | None = None, keep: str = "front") -> Sweep:
    """Works out what each measurement depends on; reads parts of the source, writes nothing.

    Args:
        release: from `plan_release`; what lies beside the models is not made.
        pack: a reference pack of the same source, texts and settings; None makes one.
        keep: one of `KEEP`.

    Raises:
        OutputError: `keep` is none of them.
        EvalError: a text cannot be read.
    """
    if keep not in KEEP:
        raise OutputError(f"{keep}: files to keep are one of {', '.join(KEEP)}")
    keys = keys_of(release, pack)
    return Sweep(release, keys.variants, keys.reference, keys.importance, pack, keep)


def run_sweep(
    sweep: Sweep, out: Path | str, *, means: Means | None = None, command: Sequence[str] = ()
) -> dict[str, Any]:
    """Measures what is missing, and writes the report over all.

    Args:
        sweep: from `plan_sweep`.
        out: folder for the kept files and report.json, .md, .html; made if missing.
        means: threads, progress, who encodes.
        command: what does the same again, for the report.

    Returns:
        The content of report.json.

    Raises:
        OutputError: the folder cannot be written or the disk is too small; what is finished stays.
        EvalError: a file cannot be evaluated; what is finished stays.
    """
    out, means = Path(out), means or Means()
    missing = sweep.missing(out)
    _check_space(out, sweep.disk_bytes if missing else 0)
    with unfinished_work(out, _FOLDER) as (folder, passing):
        try:
            return _run(sweep, folder, passing, out, missing, means, command)
        except BaseException:
            _drop_unmeasured(sweep, folder)
            raise


def _run(
    sweep: Sweep,
    folder: Path,
    passing: Path,
    out: Path,
    missing: Sequence[Variant],
    means: Means,
    command: Sequence[str],
) -> dict[str, Any]:
    release = sweep.release
    matrix = folder / f"{sweep.importance_key}-imatrix.gguf"
    pack = sweep.pack or folder / f"{sweep.reference_key}.pqref"
    needs_matrix = bool(sweep.importance_key)
    for path in folder.glob("*unfinished*"):  # of sweeps of other texts or settings, which no run takes up any more
        if not path.name.lstrip(".").startswith((matrix.stem, pack.name)):
            path.unlink()
    if missing and not (pack.exists() and (matrix.exists() or not needs_matrix)):
        _make_reference(sweep, passing / release.reference.name, pack, matrix, means)
    if needs_matrix and matrix.exists() and release.calibrating:
        named = replace(read_importance(matrix), file=release.calibrating.name)
        release = plan_again(release, named)
    measured: dict[str, Mapping[str, Any]] = {}
    for key, variant in zip(sweep.keys, release.variants, strict=True):
        found = _read(folder, key)
        if found is None:
            path = folder / variant.name
            write_variant(variant, path, means)
            found = measure_variant(release, variant, path, pack, means)
            with replacing(folder / f"{key}.json", is_result=False) as temporary:
                temporary.write_text(json.dumps({"key": key, "variant": found}, ensure_ascii=False), encoding="utf-8")
        measured[key] = found
        _drop_files(sweep, folder, measured)
    kept = _names_to_keep(sweep, list(measured.values()))
    for key, variant in zip(sweep.keys, release.variants, strict=True):
        if variant.name in kept:
            _put_in_place(variant, folder, out, measured[key], means)
    result = {
        "schema": SCHEMA,
        "version": __version__,
        "source": describe_source(release),
        "reference": release.reference.recipe,
        "importance": describe_importance(release, None),
        "command": list(command),
        "sidecars": [],
        "variants": [dict(entry) | {"is_kept": _is_there(out, entry)} for entry in measured.values()],
    }
    write_reports(result, out)
    if release.calibrating and matrix.exists():
        with replacing(out / release.calibrating.name) as temporary:
            shutil.copyfile(matrix, temporary)
    if sweep.pack is None:
        pack.unlink(missing_ok=True)
    return result


def _make_reference(sweep: Sweep, reference: Path, pack: Path, matrix: Path, means: Means) -> None:
    """Writes the reference, keeps what it says about the texts and which inputs matter, deletes it."""
    release = sweep.release
    write_variant(release.reference, reference, means, "reference")
    if sweep.importance_key and not matrix.exists() and release.calibrating:
        make_importance(release, reference, matrix.parent, means, matrix.with_suffix(".unfinished"))
        os.replace(matrix.with_name(release.calibrating.name), matrix)
    if not pack.exists():
        with means.bars.steps("reference") as advance:
            make_reference(
                reference,
                release.settings.texts,
                pack,
                PackSettings(
                    release.settings.context,
                    release.settings.chunks,
                    release.settings.positions,
                    with_head=True,
                    threads=means.threads,
                    gpu_layers=means.gpu_layers,
                    resume=True,
                ),
                is_result=False,
                progress=advance,
            )
    reference.unlink()


def _drop_files(sweep: Sweep, folder: Path, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Deletes the finished files that will not stay."""
    kept = _names_to_keep(sweep, list(measured.values()))
    for entry in measured.values():
        if entry["file"] not in kept:
            (folder / entry["file"]).unlink(missing_ok=True)


def _drop_unmeasured(sweep: Sweep, folder: Path) -> None:
    """Deletes the files that a later run would write again."""
    for key, variant in zip(sweep.keys, sweep.release.variants, strict=True):
        if _read(folder, key) is None:
            (folder / variant.name).unlink(missing_ok=True)


def _names_to_keep(sweep: Sweep, entries: Sequence[Mapping[str, Any]]) -> set[str]:
    if sweep.keep == "none":
        return set()
    points = [(entry["file_bytes"], entry["evaluation"]["metrics"]["kld"]["mean"]) for entry in entries]
    front = find_front(points) if sweep.keep == "front" else set(range(len(entries)))
    return {entries[i]["file"] for i in front}


def _put_in_place(variant: Variant, folder: Path, out: Path, entry: Mapping[str, Any], means: Means) -> None:
    """The measured file, where the user finds it; made again if it is not there any more."""
    path = out / variant.name
    if (folder / variant.name).exists():
        put_in_place([(folder / variant.name, path)])
    elif not _is_there(out, entry):
        write_variant(variant, path, means)
    if not _is_there(out, entry):
        raise OutputError(f"{path}: is not the file that was measured; delete {folder} and run the sweep again")


def _is_there(out: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the file that was measured lies where the user finds it; an earlier sweep may have put it there."""
    path, digest = out / entry["file"], entry["evaluation"]["provenance"]["model"]["sha256"]
    return path.exists() and bool(identify(path).sha256 == digest)


def _check_space(out: Path, needed_bytes: int) -> None:
    try:
        free = shutil.disk_usage(next(path for path in (out, *out.resolve().parents) if path.exists())).free
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error
    if free < needed_bytes:
        raise OutputError(
            f"{out}: the sweep takes up to {needed_bytes:,} bytes of disk and {free:,} are left; free some "
            "space, write elsewhere, or keep no files"
        )


def _read(folder: Path, key: str) -> Mapping[str, Any] | None:
    """A kept measurement; None where there is none that can be read."""
    path = folder / f"{key}.json"
    try:
        found = read_json(path) if path.exists() else None
    except SourceError:
        return None
    if not isinstance(found, dict) or found.get("key") != key or not isinstance(found.get("variant"), dict):
        return None
    return dict(found["variant"])
