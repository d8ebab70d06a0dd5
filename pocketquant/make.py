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
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from pocketquant.convert import open_model
from pocketquant.demo import text_path
from pocketquant.errors import OutputError
from pocketquant.eval import WeightError, compare, weight_errors
from pocketquant.eval.report import Report, identify
from pocketquant.gguf_file import file_name, open_gguf
from pocketquant.model import Model, Plan
from pocketquant.pipeline import write
from pocketquant.quant import open_recipe, plan, read_importance
from pocketquant.runtime import require_runtime

DEFAULT_RECIPES = ("pocket_4bit", "q8_0")
SCHEMA = "pocketquant.make/1"

ByteBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
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


@dataclass(frozen=True)
class Release:
    """What `make_release` will do, decided: nothing is written yet.

    Attributes:
        variants: the files to keep.
        reference: full precision, for the evaluation; made and deleted again.
    """

    source: Path
    model: Model
    variants: tuple[Variant, ...]
    reference: Variant
    text: Path
    context: int
    chunks: int | None

    @property
    def kept_bytes(self) -> int:
        return sum(variant.plan.file_bytes for variant in self.variants)

    @property
    def disk_bytes(self) -> int:
        """Free disk the run needs."""
        return self.kept_bytes + self.reference.plan.file_bytes

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
    reference_type: str = "f32",
) -> Release:
    """Opens the source and plans every file; reads no weights, writes nothing.

    Args:
        source: checkpoint folder or full-precision GGUF.
        recipes: names or TOML files, one output each.
        text: what to measure on; None for the embedded evaluation text.
        context: tokens in a window.
        chunks: most windows to score; None for the whole text.
        imatrix: importance matrix for the quantized files.
        reference_type: recipe of the reference: f32, or bf16 where memory is short.
    """
    require_runtime()
    model = open_model(source)
    importance = read_importance(imatrix) if imatrix else None
    variants = tuple(_variant(model, recipe, importance) for recipe in recipes)
    reference = _variant(model, reference_type, None)
    return Release(Path(source), model, variants, reference, text or text_path("evaluation"), context, chunks)


def _variant(model: Model, recipe: str, importance: Any) -> Variant:
    opened = open_recipe(recipe)
    return Variant(opened.name, file_name(model.metadata, opened.name), plan(model, opened, importance))


def make_release(
    release: Release,
    out: Path | str,
    *,
    threads: int | None = None,
    gpu_layers: int = 0,
    bars: Bars | None = None,
) -> dict[str, Any]:
    """Makes, measures and puts in place everything a release names.

    Args:
        release: from `plan_release`.
        out: folder for the files, report.json, report.md and SHA256SUMS; made if missing.
        threads: for encoding and evaluation.
        gpu_layers: for the evaluation.
        bars: progress bars.

    Returns:
        The content of report.json.

    Raises:
        OutputError: the folder cannot be written or the disk is too small.
        EvalError: the files cannot be evaluated; nothing in `out` has changed.
    """
    out, bars = Path(out), bars or Bars()
    with _staging(out, release.disk_bytes) as staging:
        reference = staging / release.reference.name
        _write(release.reference, reference, "reference", threads, bars)
        measured = []
        for variant in release.variants:
            path = staging / variant.name
            _write(variant, path, variant.name, threads, bars)
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
        result = _describe(release, measured)
        (staging / "report.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (staging / "report.md").write_text(to_markdown(result), encoding="utf-8")
        names = [*(variant.name for variant in release.variants), "report.json", "report.md"]
        sums = "".join(f"{identify(staging / name).sha256}  {name}\n" for name in names)
        (staging / "SHA256SUMS").write_text(sums, encoding="utf-8")
        for name in [*names, "SHA256SUMS"]:
            os.replace(staging / name, out / name)
    return result


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


def _write(variant: Variant, path: Path, label: str, threads: int | None, bars: Bars) -> None:
    with bars.bytes(label, sum(item.nbytes for item in variant.plan.tensors)) as advance:
        write(variant.plan, path, threads=threads, on_bytes=advance)


def _describe(release: Release, measured: Sequence[Measured]) -> dict[str, Any]:
    source = release.source
    files = [source] if source.is_file() else sorted([*source.glob("*.json"), *source.glob("*.safetensors")])
    return {
        "schema": SCHEMA,
        "source": {
            "name": _name(release),
            "n_weights": sum(prod(tensor.shape) for tensor in release.model.tensors),
            "notes": list(release.model.notes),
            "files": [asdict(identify(path)) for path in files],
        },
        "reference": release.reference.recipe,
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


def _name(release: Release) -> str:
    name = release.model.metadata.get("general.name")
    return str(name.value) if name else release.source.resolve().name


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
