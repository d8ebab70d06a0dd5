"""The whole job: a source -> quantized files, measured against full precision, with a report and checksums.

Everything is made in a hidden folder inside the target and moved into place at the end, so an interrupted run changes
nothing that was there. The full-precision reference lives only as long as the evaluation needs it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.convert.sources import Parts, open_parts
from pocketquant.demo import text_path
from pocketquant.errors import EvalError, OutputError
from pocketquant.eval import WeightError, compare, weight_errors
from pocketquant.eval.report import Report, identify
from pocketquant.gguf_file import file_name, open_gguf
from pocketquant.model import Model, Plan
from pocketquant.outputs import default_mmproj_recipe, plan_outputs
from pocketquant.pipeline import Run, write
from pocketquant.quant import Importance, Recipe, open_recipe, plan, read_importance
from pocketquant.quant.collect import SELF, Calibration, collect_importance
from pocketquant.quant.importance import importance_of, write_sums
from pocketquant.runtime import require_runtime
from pocketquant.splits import check_whole, split_file, split_plan

DEFAULT_RECIPES = ("pocket_4bit", "q8_0")
SCHEMA = "pocketquant.make/1"
CALIBRATION_CHUNKS = 128
"""Windows of calibration text, unless told otherwise: more change little, and every one costs time."""

ByteBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
Rounder = Callable[[Plan], Plan]
StepBar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Bars:
    """Progress bars, given by whoever has a screen: `bytes(label, total)` and `steps(label)`."""

    bytes: ByteBar = lambda label, total: nullcontext(lambda nbytes: None)
    steps: StepBar = lambda label: nullcontext(lambda done, total: None)


@dataclass(frozen=True)
class Variant:
    """One file to make."""

    recipe: str
    name: str
    plan: Plan
    opened: Recipe


@dataclass(frozen=True)
class Calibrating:
    """The importance matrix that a release makes for itself, from its own reference.

    Attributes:
        text: a file, or "self" for a text that the model writes.
        chunks: most windows; None for the default.
        name: of the matrix, which is kept beside the quantized files.
    """

    text: Path | str
    chunks: int | None
    name: str


@dataclass(frozen=True)
class Release:
    """What `make_release` will do, decided: nothing is written yet.

    Attributes:
        variants: the files to keep.
        sidecars: the vision tower's and the multi-token-prediction block's file, where the source has them.
        reference: full precision, for the evaluation; made and deleted again.
        importance: a matrix that was given; None if one is made, or none used.
        calibrating: how to make one; the variants are then planned for a stand-in, which costs the same bytes.
    """

    source: str
    model: Model
    variants: tuple[Variant, ...]
    sidecars: tuple[Variant, ...]
    reference: Variant
    text: Path
    context: int
    chunks: int | None
    importance: Importance | None = None
    calibrating: Calibrating | None = None
    split_bytes: int | None = None
    rounded: Rounder | None = None

    @property
    def kept_bytes(self) -> int:
        return sum(variant.plan.file_bytes for variant in (*self.variants, *self.sidecars))

    @property
    def disk_bytes(self) -> int:
        """Free disk the run needs."""
        shards = (
            0
            if self.split_bytes is None
            else max(variant.plan.file_bytes for variant in (*self.variants, *self.sidecars))
        )
        return self.kept_bytes + self.reference.plan.file_bytes + shards

    @property
    def memory_bytes(self) -> int:
        """Memory the evaluation needs: two models at once, without their caches."""
        return self.reference.plan.file_bytes + max(variant.plan.file_bytes for variant in self.variants)


@dataclass(frozen=True)
class Measured:
    """One finished variant: its file, what it lost on text, and what each tensor lost."""

    variant: Variant
    report: Report
    weights: tuple[WeightError, ...]


def plan_release(
    source: Path | str,
    *,
    recipes: Sequence[str] = DEFAULT_RECIPES,
    text: Path | None = None,
    context: int = 512,
    chunks: int | None = None,
    imatrix: Path | None = None,
    calibrate: Path | str | None = None,
    calibrate_chunks: int | None = None,
    reference_type: str = "f32",
    parts: Parts | None = None,
    mmproj: str | None = None,
    split_bytes: int | None = None,
    rounded: Rounder | None = None,
) -> Release:
    """Opens the source and plans every file; reads no weights, writes nothing.

    Args:
        source: as `open_model`.
        recipes: names or TOML files, one output each.
        text: what to measure on; None for the embedded evaluation text.
        context: tokens in a window.
        chunks: most windows to score; None for the whole text.
        imatrix: importance matrix for the quantized files.
        calibrate: without one, the text to make one from: a file, or "self" for a text that the model writes. None for
            no importance; `calibration_text()` is what the command takes.
        calibrate_chunks: most windows of it.
        reference_type: recipe of the reference: f32, or bf16 where memory is short.
        parts: the source, opened otherwise than `open_parts(source)` does: with an adapter, say. The weights are read
            several times, so open a repository on a hub with `keep_source`.
        mmproj: recipe of the vision tower; None for the first recipe's companion.
        split_bytes: largest file to keep; None for no limit. Files are measured whole and split afterwards.
        rounded: what makes of a quantized file's plan one that is rounded in another way, by statistics say.

    Raises:
        EvalError: the same text to calibrate and to measure on.
        OutputError: a tensor, or a file that runtimes do not read in shards, is larger than `split_bytes`.
    """
    require_runtime()
    text = text or text_path("evaluation")
    parts = parts or open_parts(source)
    model = parts.model
    importance, calibrating = read_importance(imatrix) if imatrix else None, None
    planned_for = importance
    if imatrix is None and calibrate is not None:
        if calibrate != SELF and Path(calibrate).resolve() == text.resolve():
            raise EvalError(f"{text}: measured on the text it is calibrated on, a file looks better than it is")
        name = file_name(model.metadata, "imatrix").replace("-IMATRIX.gguf", "-imatrix.gguf")  # no type of numbers
        calibrating = Calibrating(calibrate, calibrate_chunks, name)
        planned_for = _stand_in(model, calibrating)
    variants = tuple(_variant(model, open_recipe(recipe), planned_for, rounded) for recipe in recipes)
    if calibrating and not any(variant.plan.importance for variant in variants):
        calibrating = None  # nothing is rounded in blocks
    if calibrating and planned_for:
        check_whole("importance matrix", Path(calibrating.name), _least_bytes(planned_for), split_bytes)
    for variant in variants:
        split_plan(variant.plan, Path(variant.name), split_bytes)  # refuses what cannot be split
    reference = _variant(model, open_recipe(reference_type), None)
    return Release(
        str(source),
        model,
        variants,
        _sidecars(parts, variants[0], mmproj, split_bytes),
        reference,
        text,
        context,
        chunks,
        importance,
        calibrating,
        split_bytes,
        rounded,
    )


def _sidecars(parts: Parts, first: Variant, mmproj: str | None, split_bytes: int | None) -> tuple[Variant, ...]:
    """What lies beside the model, after the first variant: `mmproj-NAME` and `mtp-NAME`."""
    tower_recipe = mmproj or default_mmproj_recipe(first.recipe)
    outputs = plan_outputs(parts, Path(first.name), first.opened, lambda model: first.plan, tower_recipe, split_bytes)
    return tuple(
        Variant(str(output.plan.metadata["pocketquant.recipe"].value), output.path.name, output.plan, first.opened)
        for output in outputs[1:]
    )


def calibration_text() -> Path:
    """The embedded text that `make` calibrates on by default."""
    return text_path("calibration")


def _stand_in(model: Model, calibrating: Calibrating) -> Importance:
    """Importance with the names and numbers' sizes of the matrix to come, for plans that cost what theirs will."""
    weights = {
        tensor.name: np.broadcast_to(np.float32(1), (*tensor.shape[:-2], tensor.n_cols))
        for tensor in model.tensors
        if len(tensor.shape) > 1 and tensor.layer is not None
    }
    text = calibrating.text
    return Importance(weights, calibrating.name, (SELF if text == SELF else Path(text).name,), 1)


def _least_bytes(importance: Importance) -> int:
    """What the numbers of a matrix take in its file: for each expert as many as it has columns, and a count."""
    return sum(4 * (weights.size + weights.size // weights.shape[-1]) for weights in importance.weights.values())


def _variant(model: Model, recipe: Recipe, importance: Importance | None, rounded: Rounder | None = None) -> Variant:
    planned = plan(model, recipe, importance)
    return Variant(
        recipe.name, file_name(model.metadata, recipe.name), rounded(planned) if rounded else planned, recipe
    )


def make_release(
    release: Release,
    out: Path | str,
    *,
    threads: int | None = None,
    gpu_layers: int = 0,
    bars: Bars | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Makes, measures and puts in place everything a release names.

    Args:
        release: from `plan_release`.
        out: folder for the files, report.json, report.md and SHA256SUMS; made if missing.
        threads: for encoding and evaluation.
        gpu_layers: for the evaluation.
        bars: progress bars.
        run: who encodes, as in `pipeline.write`.

    Returns:
        The content of report.json.

    Raises:
        OutputError: the folder cannot be written or the disk is too small.
        EvalError: the files cannot be evaluated; nothing in `out` has changed.
    """
    out, bars = Path(out), bars or Bars()
    with _staging(out, release.disk_bytes) as staging:
        reference = staging / release.reference.name
        _write(release.reference, reference, "reference", threads, bars, run)
        calibration = None
        if release.calibrating:
            release, calibration = _calibrate(release, reference, staging, threads, gpu_layers, bars)
        measured = []
        for variant in release.variants:
            path = staging / variant.name
            _write(variant, path, variant.name, threads, bars, run)
            with bars.steps(f"evaluate {variant.recipe}") as advance:
                report = compare(
                    path,
                    reference,
                    release.text,
                    context=release.context,
                    chunks=release.chunks,
                    threads=threads,
                    gpu_layers=gpu_layers,
                    progress=advance,
                )
            measured.append(Measured(variant, report, tuple(weight_errors(open_gguf(path), release.model))))
        reference.unlink()
        result = _describe(release, measured, calibration)
        (staging / "report.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (staging / "report.md").write_text(to_markdown(result), encoding="utf-8")
        for sidecar in release.sidecars:
            _write(sidecar, staging / sidecar.name, sidecar.name, threads, bars, run)
        made = [release.calibrating.name] if release.calibrating else []
        files = [*release.variants, *release.sidecars]
        kept = [name for variant in files for name in _split(staging / variant.name, release.split_bytes)]
        names = [*kept, *made, "report.json", "report.md"]
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


def _calibrate(
    release: Release, reference: Path, staging: Path, threads: int | None, gpu_layers: int, bars: Bars
) -> tuple[Release, Calibration]:
    """Makes the matrix, and plans every variant again with it."""
    calibrating = release.calibrating
    assert calibrating is not None
    is_written = calibrating.text == SELF
    with bars.steps("calibrate") as advance:
        sums, calibration = collect_importance(
            reference,
            calibrating.text,
            context=release.context,
            chunks=calibrating.chunks or (None if is_written else CALIBRATION_CHUNKS),
            threads=threads,
            gpu_layers=gpu_layers,
            progress=advance,
        )
    write_sums(sums, staging / calibrating.name)
    importance = importance_of(sums, calibrating.name)
    variants = tuple(
        _variant(release.model, variant.opened, importance, release.rounded) for variant in release.variants
    )
    return replace(release, variants=variants, importance=importance), calibration


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


def _write(variant: Variant, path: Path, label: str, threads: int | None, bars: Bars, run: Run | None) -> None:
    with bars.bytes(label, sum(item.nbytes for item in variant.plan.tensors)) as advance:
        write(variant.plan, path, threads=threads, on_bytes=advance, run=run)


def _describe(release: Release, measured: Sequence[Measured], calibration: Calibration | None) -> dict[str, Any]:
    source = Path(release.source)
    files = [source] if source.is_file() else sorted([*source.glob("*.json"), *source.glob("*.safetensors")])
    # a repository's files are not here to be digested; its name and revision stand in `given`
    return {
        "schema": SCHEMA,
        "source": {
            "name": _name(release),
            "given": source.name if source.exists() else release.source,
            "n_weights": sum(prod(tensor.shape) for tensor in release.model.tensors),
            "notes": list(release.model.notes),
            "files": [asdict(identify(path)) for path in files],
        },
        "reference": release.reference.recipe,
        "importance": _describe_importance(release, calibration),
        "sidecars": [
            {"recipe": item.recipe, "file": item.name, "file_bytes": item.plan.file_bytes} for item in release.sidecars
        ],
        "variants": [
            {
                "recipe": item.variant.recipe,
                "file": item.variant.name,
                "file_bytes": item.variant.plan.file_bytes,
                "bits_per_weight": item.variant.plan.bits_per_weight,
                "evaluation": item.report.to_json(),
                "weights": [asdict(error) | {"role": error.role.value} for error in item.weights],
            }
            for item in measured
        ],
    }


def _describe_importance(release: Release, calibration: Calibration | None) -> dict[str, Any] | None:
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
        "context": release.context,
        "tokens": calibration.windows.size,
        "tokens_sha256": calibration.sha256,
        "text": None if text == SELF else asdict(identify(text)),
    }


def _name(release: Release) -> str:
    name = release.model.metadata.get("general.name")
    return str(name.value) if name else Path(release.source).name


def to_markdown(result: dict[str, Any]) -> str:
    """report.json's content as a page for people."""
    lines = [
        f"# {result['source']['name']}, quantized",
        "",
        f"{result['source']['n_weights']:,} weights. Measured against the same checkpoint in {result['reference']}.",
        "",
        "| file | bytes | bits per weight | KL divergence | 99th percentile | same top token | perplexity ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for variant in result["variants"]:
        metrics = variant["evaluation"]["metrics"]
        kld, top1, ppl = metrics["kld"], metrics["top1"], metrics["ppl"]
        lines.append(
            f"| {variant['file']} | {variant['file_bytes']:,} | {variant['bits_per_weight']:.2f} | "
            f"{kld['mean']:.5f}{_plus_minus(kld['se'], '.1g')} | {kld['p99']:.4f} | "
            f"{100 * top1['mean']:.2f}{_plus_minus(top1['se'] and 100 * top1['se'], '.1g')} % | "
            f"{_number(ppl['ratio'])}{_plus_minus(ppl['ratio_se'], '.1g')} |"
        )
    first = result["variants"][0]["evaluation"]
    used_importance = result["importance"]
    if used_importance:
        lines += ["", f"Rounding weighted by {used_importance['file']}, from {', '.join(used_importance['datasets'])}."]
    lines += [
        "",
        f"{first['tokens']:,} tokens scored in {first['windows']} windows of {first['provenance']['context']}, text "
        f"`{first['provenance']['corpus']['name']}`; KL divergence in nats; errors are standard errors.",
        "",
        "## Tensors that lost most",
        "",
        "| file | tensor | role | type | SNR (dB) |",
        "|---|---|---|---|---:|",
    ]
    for variant in result["variants"]:
        rounded = [error for error in variant["weights"] if error["snr_db"] is not None]
        for error in sorted(rounded, key=lambda error: error["snr_db"])[:5]:
            lines.append(
                f"| {variant['file']} | {error['name']} | {error['role']} | {error['format']} | {error['snr_db']:.1f} |"
            )
    used = first["provenance"]["versions"]
    versions = ", ".join(f"{name} {used[name]}" for name in ("pocketquant", "llama_cpp", "python", "numpy"))
    lines += ["", f"Made with {versions}.", *(f"\nNote: {note}" for note in result["source"]["notes"])]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    """A ruined model's perplexity may be beyond what JSON can write."""
    return "not finite" if value is None else f"{value:.4f}"


def _plus_minus(error: float | None, spec: str) -> str:
    return "" if error is None else f" ± {error:{spec}}"
