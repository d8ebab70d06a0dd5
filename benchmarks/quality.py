"""Loss per byte: our files against llama.cpp's quantizer with an importance matrix, at bytes no larger than its.

    python benchmarks/quality.py [--source CHECKPOINT] [--calibration FILE...] [--evaluation NAME=FILE...]
                                 [--stats FILE] [--sensitivity FILE] [--chunks N] [--sizes Q4_K_M,...] [--ablation]
                                 [--sampled N] [--epochs N] [--keep FOLDER] [--csv FILE]

Without files of your own: the embedded model and its texts. Both sides calibrate on the same texts: the peer by an
importance matrix (llama.cpp's own quantizer, in this process), ours by `pocketquant calibrate`. Every file is scored
against F32 on texts that neither saw, by llama.cpp's kernels ("native"), and dequantized to F32 ("weights only"), which
leaves out what the kernels' rounding of activations costs. Columns: bytes, mean KL divergence with its standard error,
99th percentile, same top token, ratio of the means to the peer's of that size. `--ablation` has one row per step at
Q4_K_M's bytes. `--keep` holds what was made, and an interrupted run goes on there.
`--csv` writes the native figures as rows too, for `plot_quality.py`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent))

from quality_peer import SIZES, importance_of, quantize_peer

from pocketquant.calibration.importance import Importance
from pocketquant.calibration.statistics import Statistics, open_statistics
from pocketquant.calibration.statistics_run import collect_statistics
from pocketquant.calibration.statistics_writing import merge_statistics
from pocketquant.convert.sources import open_model
from pocketquant.demo import checkpoint_dir, text_path
from pocketquant.errors import EvalError
from pocketquant.eval.compare import compare
from pocketquant.files.reading import sha256_of
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.writing import write
from pocketquant.model import Model, Plan
from pocketquant.quant import open_recipe, plan
from pocketquant.quant.choosing import Choice, Target
from pocketquant.quant.loss_table import LossTable, read_figures, write_losses
from pocketquant.quant.prediction import PredictSettings, predict_losses
from pocketquant.quant.rounding.encoding import STEPS
from pocketquant.quant.sensitivity import Sensitivity
from pocketquant.texts.calibration import CalibrationSettings, cut_texts
from pocketquant.texts.corpus import Text

RECIPES = {"IQ4_XS": "iq4_xs", "Q4_K_S": "q4_k_s", "Q4_K_M": "q4_k_m", "Q5_K_M": "q5_k_m", "Q6_K": "q6_k"}

Row = tuple[str, str, Path, Path]
"""Size, method, file, the peer's file."""


@dataclass(frozen=True)
class Bench:
    """What a run needs: files in `folder`, the source in F32, texts, windows, what to choose types by."""

    folder: Path
    reference: Path
    texts: tuple[Text, ...]
    context: int
    chunks: int
    threads: int
    importance: Importance
    statistics: Statistics
    sensitivity: Path | None
    device: str
    kinds: tuple[str, ...]
    calibration: tuple[Path, ...]
    sampled: int
    epochs: float

    @property
    def model(self) -> Model:
        return open_gguf(self.reference)

    @property
    def mark(self) -> str:
        """For the names of files: what they depend on besides the model."""
        return self.device + ("" if self.sensitivity is None else f" {sha256_of(self.sensitivity)[:8]}")

    def table(self, steps: str, gradients: bool) -> LossTable:
        """Predicted losses for one way of rounding; made once."""
        table = None if self.sensitivity is None or gradients else read_figures(self.sensitivity)
        path = self.folder / f"losses {steps} {'curvature' if gradients else 'inputs'} {self.mark}.json"
        if not path.exists():
            assert table is None or isinstance(table, Sensitivity)
            options = None if steps == "none" else STEPS[steps]
            settings = PredictSettings(options, table, gradients, activations=True, thorough=True)
            made = predict_losses(self.model, self.statistics, settings)
            write_losses(made, path)
        found = read_figures(path)
        assert isinstance(found, LossTable)
        return found


def plan_ours(bench: Bench, nbytes: int, steps: str, gradients: bool) -> Plan:
    """The file of at most so many bytes that is predicted to lose least when rounded by these steps."""
    table = bench.table(steps, gradients)
    choice = Choice(target=Target(nbytes), figures=table, device=bench.device)
    if steps == "none":
        return plan(bench.model, choice, bench.importance)
    steps = steps if gradients or steps != "two-sided" else "descent"
    return plan(bench.model, replace(choice, statistics=bench.statistics, steps=steps))


def plan_with_prior(bench: Bench, nbytes: int) -> Plan:
    """The same without any statistics or runs of this model."""
    choice = Choice(target=Target(nbytes), figures=read_figures(bench.sensitivity), device=bench.device)
    return plan(bench.model, choice, bench.importance)


def plan_recipe(bench: Bench, recipe: str, steps: str) -> Plan:
    """A recipe's types in our own rounding."""
    if steps == "none":
        return plan(bench.model, open_recipe(recipe), bench.importance)
    choice = Choice(open_recipe(recipe), statistics=bench.statistics, steps=steps, keep_types=True)
    return plan(bench.model, choice)


def score(bench: Bench, path: Path, kind: str) -> dict[str, Any]:
    """The numbers of a file on every text; `kind` is "native" or "weights only". Kept beside the file."""
    result = path.with_suffix(f".{kind.split()[0]}.json")
    run = {"sha256": sha256_of(path), "texts": [sha256_of(text.path) for text in bench.texts]}
    run |= {"context": bench.context, "chunks": bench.chunks}
    if result.exists():
        kept = json.loads(result.read_text())
        if kept.pop("run") == run:
            return kept
    judged = path
    if kind == "weights only":
        judged = path.with_suffix(".f32.gguf")
        write(plan(open_gguf(path), open_recipe("f32")), judged, threads=bench.threads)
    numbers: dict[str, Any] = {}
    for text in bench.texts:
        report = compare(
            judged, bench.reference, [text], context=bench.context, chunks=bench.chunks, threads=bench.threads
        )
        kld, top = report.metrics.kld, report.metrics.top1
        numbers[text.domain] = {"mean": kld.mean, "se": kld.se or 0.0, "p99": kld.p99, "top": top.mean}
    if judged is not path:
        judged.unlink()
    result.write_text(json.dumps({"run": run} | numbers))
    return numbers


def make(bench: Bench, name: str, maker: Callable[[], Plan] | None, file_type: int = 0) -> Path:
    """The file of that name, made if it is not there."""
    path = bench.folder / f"{name.replace(' ', '_').replace(',', '')}.gguf"
    if not path.exists():
        started = time.process_time()
        if maker is None:
            unfinished = path.with_suffix(".part")
            quantize_peer(bench.reference, bench.importance, file_type, unfinished, bench.threads)
            unfinished.rename(path)
        else:
            write(maker(), path, threads=bench.threads)
        print(f"{path.name}: {time.process_time() - started:.0f} CPU s", file=sys.stderr)
    return path


def print_table(bench: Bench, rows: Sequence[Row]) -> None:
    """One table for each text."""
    for text in bench.texts:
        print(f"\n{text.domain} ({text.path.name}), context {bench.context}, up to {bench.chunks} windows\n")
        titles = ["size", "method", "bytes", "native KL", "p99", "same top", "ratio"]
        titles += ["weights-only KL", "ratio"] * (len(bench.kinds) > 1)
        print(f"| {' | '.join(titles)} |\n|---|---|{'---:|' * (len(titles) - 2)}")
        for size, method, path, peer in rows:
            cells = [size, method, f"{path.stat().st_size:,}"]
            for kind in bench.kinds:
                own, other = (score(bench, file, kind)[text.domain] for file in (path, peer))
                cells.append(f"{own['mean']:.6f} ± {own['se']:.6f}")
                if kind == "native":
                    cells += [f"{own['p99']:.4f}", f"{100 * own['top']:.2f} %"]
                cells.append(f"{own['mean'] / other['mean']:.3f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def write_rows(bench: Bench, rows: Sequence[Row], out: Path) -> None:
    """The native figures of `print_table` at the same digits, one row for each file and text."""
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "size", "method", "bytes", "kld_nats", "kld_se", "p99_nats", "same_top"])
        for text in bench.texts:
            for size, method, path, _ in rows:
                own = score(bench, path, "native")[text.domain]
                kld = [f"{own['mean']:.6f}", f"{own['se']:.6f}", f"{own['p99']:.4f}", f"{own['top']:.4f}"]
                writer.writerow([text.domain, size, method, path.stat().st_size, *kld])


def sample_more(bench: Bench, windows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32] | None:
    """The model's own windows for tuning, made once; None for none."""
    from pocketquant.tuning.tune import sample_continuations

    path = bench.folder / f"sampled {bench.sampled}.npy"
    if bench.sampled and not path.exists():
        np.save(path, sample_continuations(bench.reference, windows, bench.sampled, threads=bench.threads))
    return np.load(path) if bench.sampled else None


def make_tuned(bench: Bench, name: str, nbytes: int) -> Path:
    """The file with curvature on both sides, tuned on the calibration texts and the model's own; made once."""
    from pocketquant.tuning.tune import TuneSettings, TuningWindows, sampled_text, tune_file, tuning_bytes

    path = bench.folder / f"{name.replace(' ', '_').replace(',', '')}.gguf"
    if not path.exists():
        texts = [str(text) for text in bench.calibration]
        windows, read, _ = cut_texts(bench.reference, texts, CalibrationSettings(bench.context, threads=bench.threads))
        more = sample_more(bench, windows)
        if more is not None:
            read = (*read, sampled_text(more))
        room = tuning_bytes(read)
        rounded = make(bench, f"{name} before", lambda: plan_ours(bench, nbytes - room, "two-sided", True))
        started = time.process_time()
        tuned = tune_file(
            rounded,
            bench.model,
            TuningWindows(windows, read, more),
            path,
            TuneSettings(bench.epochs, threads=bench.threads),
        )
        seconds = time.process_time() - started
        print(f"{path.name}: {seconds:.0f} CPU s, held back {tuned.before:.6f} to {tuned.after:.6f}", file=sys.stderr)
    return path


def compare_sizes(bench: Bench, sizes: Sequence[str], methods: Sequence[str]) -> list[Row]:
    """Rows against the peer at each of its sizes."""
    rows = []
    for size in sizes:
        peer = make(bench, f"peer {size}", None, SIZES[size])
        nbytes = peer.stat().st_size
        made = [("peer", peer)]
        for method in methods:
            if method == TUNED:
                made.append((method, make_tuned(bench, f"{size} {method} {bench.mark}", nbytes)))
            elif bench.statistics.has_outputs or "curvature" not in method:
                maker = lambda m=method, n=nbytes: METHODS[m](bench, n)  # noqa: E731
                made.append((method, make(bench, f"{size} {method} {bench.mark}", maker)))
        rows += [(size, method, path, peer) for method, path in made]
        for _, path in made:
            for kind in bench.kinds:
                score(bench, path, kind)
        print(f"{size}: done", file=sys.stderr, flush=True)
    return rows


METHODS: dict[str, Callable[[Bench, int], Plan]] = {
    "types only, no statistics": plan_with_prior,
    "types only, curvature": lambda bench, nbytes: plan_ours(bench, nbytes, "none", True),
    "types and rounding, no gradients": lambda bench, nbytes: plan_ours(bench, nbytes, "descent", False),
    "types and rounding, curvature": lambda bench, nbytes: plan_ours(bench, nbytes, "two-sided", True),
}
"""Rows beside the peer's."""

TUNED = "types and rounding, curvature, tuned"
"""One more row, where torch and gradients are there."""


def ablate(bench: Bench) -> list[Row]:
    """One row per step, at Q4_K_M's bytes."""
    peer = make(bench, "peer Q4_K_M", None, SIZES["Q4_K_M"])
    nbytes = peer.stat().st_size
    rows = [("peer", peer)]
    has_gradients = bench.statistics.has_outputs
    for steps in ("none", *STEPS):
        if steps != "two-sided" or has_gradients:
            label = f"its types, rounding {steps}"
            rows.append((label, make(bench, label, lambda s=steps: plan_recipe(bench, "q4_k_m", s))))
    label = "types without statistics, rounding none"
    rows.append((label, make(bench, f"{label} {bench.mark}", lambda: plan_with_prior(bench, nbytes))))
    for gradients in (False, True)[: 1 + has_gradients]:
        for steps in ("none", *STEPS):
            if steps == "two-sided" and not gradients:
                continue
            label = f"types {'by curvature' if gradients else 'without gradients'}, rounding {steps}"
            maker = lambda s=steps, g=gradients: plan_ours(bench, nbytes, s, g)  # noqa: E731
            rows.append((label, make(bench, f"{label} {bench.mark}", maker)))
    if has_gradients and has_torch():
        rows.append((TUNED, make_tuned(bench, f"Q4_K_M {TUNED} {bench.mark}", nbytes)))
    return [("Q4_K_M", method, path, peer) for method, path in rows]


def print_floor(bench: Bench) -> None:
    """What the order of sums alone makes of the numbers."""
    report = compare(
        bench.folder / "peer_Q6_K.gguf" if (bench.folder / "peer_Q6_K.gguf").exists() else bench.reference,
        bench.reference,
        [bench.texts[0]],
        context=bench.context,
        chunks=8,
        threads=bench.threads,
        noise_floor=True,
    )
    assert report.noise_floor is not None
    mean = report.noise_floor.metrics.kld.mean
    print(f"\nnoise floor (the same file at another batch size): mean KL {mean:.2g}")


def prepare(asked: argparse.Namespace, folder: Path) -> Bench:
    """The files that all rows share."""
    folder.mkdir(parents=True, exist_ok=True)
    reference = folder / "reference-f32.gguf"
    if not reference.exists():
        write(plan(open_model(str(asked.source)), open_recipe("f32")), reference)
    calibration = asked.calibration or [text_path("calibration")]
    evaluation = [_text(each) for each in asked.evaluation or [str(text_path("evaluation"))]]
    stats = asked.stats or folder / "calibration.stats"
    if not stats.exists():
        make_statistics(reference, calibration, stats, asked.context)
    statistics = open_statistics(stats)
    sensitivity = asked.sensitivity or without_this_model(open_gguf(reference), folder / "sensitivity.toml")
    return Bench(
        folder,
        reference,
        tuple(evaluation),
        asked.context,
        asked.chunks,
        asked.threads,
        importance_of(statistics),
        statistics,
        sensitivity,
        asked.device,
        ("native",) if asked.native_only else ("native", "weights only"),
        tuple(Path(path) for path in calibration),
        asked.sampled,
        asked.epochs,
    )


def without_this_model(model: Model, out: Path) -> Path | None:
    """The package's table without the figures of a model with as many weights as this one; None if it has none."""
    table = (resources.files("pocketquant.quant") / "sensitivity.toml").read_text(encoding="utf-8")
    head, *entries = table.split("\n[[measured]]")
    own = f"n_weights = {model.n_weights}\n"
    others = [entry for entry in entries if own not in entry]
    if len(others) == len(entries):
        return None
    out.write_text("\n[[measured]]".join([head, *others]), encoding="utf-8")
    return out


def has_torch() -> bool:
    """Whether gradients can be computed here; says why not."""
    from pocketquant.calibration.torch_layers import require_torch

    try:
        require_torch()
    except EvalError as error:
        print(f"no gradients: {error}", file=sys.stderr)
        return False
    return True


def make_statistics(reference: Path, texts: Sequence[Path], out: Path, context: int) -> None:
    """With gradients where torch is installed."""
    if not has_torch():
        collect_statistics(reference, [str(text) for text in texts], out, CalibrationSettings(context))
        return
    from pocketquant.calibration.fisher import collect_fisher

    inputs, gradients = out.with_suffix(".inputs"), out.with_suffix(".gradients")
    settings = CalibrationSettings(context)
    windows, read, _ = cut_texts(reference, [str(text) for text in texts], settings)
    collect_statistics(reference, [str(text) for text in texts], inputs, settings)
    collect_fisher(open_gguf(reference), windows, read, gradients)
    merge_statistics([inputs, gradients], out)


def _text(stated: str) -> Text:
    name, _, path = stated.rpartition("=")
    return Text(name or Path(path).stem, Path(path))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=checkpoint_dir())
    parser.add_argument("--calibration", type=Path, nargs="+")
    parser.add_argument("--evaluation", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--stats", type=Path)
    parser.add_argument("--sensitivity", type=Path)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--device", default="any")
    parser.add_argument("--methods", type=int, nargs="+", help="rows, by number")
    parser.add_argument("--sampled", type=int, default=4096, help="windows more for tuning, written by the model")
    parser.add_argument("--epochs", type=float, default=2.0, help="of tuning")
    parser.add_argument("--native-only", action="store_true", help="leave out the runs of dequantized weights")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--csv", type=Path, help="file for the native figures as rows")
    asked, _ = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        bench = prepare(asked, asked.keep or Path(name))
        if asked.ablation:
            rows = ablate(bench)
        else:
            names = [*METHODS, TUNED] if bench.statistics.has_outputs and has_torch() else list(METHODS)
            chosen = asked.methods or range(len(names))
            rows = compare_sizes(bench, asked.sizes.split(","), [names[i] for i in chosen])
        print_table(bench, rows)
        if asked.csv:
            write_rows(bench, rows, asked.csv)
        print_floor(bench)


if __name__ == "__main__":
    main(sys.argv[1:])
