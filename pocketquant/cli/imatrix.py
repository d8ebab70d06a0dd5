"""`imatrix`: makes an importance matrix, or adds several up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketquant.cli.cost import can_try, say_pace
from pocketquant.cli.options import ADVANCED, Chunks, Compute, Context, CostOnly, OutFile, Resume, Seed, Talk, option
from pocketquant.cli.screen import print_json

if TYPE_CHECKING:
    from pocketquant.model import Model
    from pocketquant.pace import Progress


@dataclass(frozen=True)
class MatrixOptions:
    """What the model is run over, and how."""

    text: Annotated[str | None, option("--text", "FILE|self", "UTF-8 text; self: the model writes it.")] = None
    context: Context = 512
    chunks: Chunks = None
    resume: Resume = False
    dry_run: CostOnly = False
    mtp_file: Annotated[
        Path | None,
        option(
            "--mtp-file --mtp",
            "FILE",
            "File of the multi-token prediction block (mtp-NAME.gguf), if it is beside the model.",
            ADVANCED,
        ),
    ] = None
    seed: Seed = 0


def imatrix(
    files: Annotated[
        list[Path], typer.Argument(metavar="GGUF", help="Model to run; with --merge, matrices to add up.")
    ],
    out: OutFile,
    *,
    options: MatrixOptions,
    merge: Annotated[bool, option("--merge", "", "Add up several matrices of one model, and run nothing.")] = False,
    compute: Compute,
    talk: Talk,
) -> None:
    """Make an importance matrix: which inputs of each weight matter.

    The model is run over a text. `quantize --imatrix` rounds by the matrix.
    """
    if merge:
        if options.text is not None or options.resume or options.mtp_file is not None or options.dry_run:
            raise typer.BadParameter(
                "runs no model, so it takes no --text, --mtp-file, --resume or --dry-run", param_hint="--merge"
            )
        _merge(files, out, talk)
        return
    if len(files) != 1:
        raise typer.BadParameter("only one model can be run; to add matrices up, give --merge", param_hint="GGUF")
    if options.text is None:
        raise typer.BadParameter("name a text, or self to let the model write one", param_hint="--text")
    _make(files[0], options.text, out, options, compute, talk)


def _make(gguf: Path, text: str, out: Path, options: MatrixOptions, compute: Compute, talk: Talk) -> None:
    """Runs the model over the text; the state of an unfinished run lies beside `out` as `.NAME.unfinished`."""
    from pocketquant.calibration.imatrix import collect_importance, unfinished_matrix
    from pocketquant.calibration.importance import write_sums
    from pocketquant.files.leftovers import work_folder
    from pocketquant.files.replacing import check_target, refuse_overwriting
    from pocketquant.gguf_file.opening import open_gguf
    from pocketquant.pace import try_out
    from pocketquant.texts.calibration import CalibrationSettings

    refuse_overwriting([out], [gguf, text, options.mtp_file])
    settings = CalibrationSettings(options.context, options.chunks, compute.threads, compute.gpu_layers, options.seed)

    def collect(state: Path, progress: Progress, *, resume: bool) -> Any:
        return collect_importance(
            gguf,
            text,
            settings,
            mtp=options.mtp_file,
            state=state,
            resume=resume,
            progress=progress,
        )

    if options.dry_run:
        if not can_try(0, [text], talk):
            return
        with work_folder(check_target(out)) as folder:
            pace = try_out(lambda progress: collect(folder / "state", progress, resume=False))
        say_pace(pace, "windows", _matrix_bytes(open_gguf(gguf)), talk)
        return
    with unfinished_matrix(out) as state:
        with talk.steps(out.name, "windows") as advance:
            sums, calibration = collect(state, advance, resume=options.resume)
        write_sums(sums, out)
    summary = {
        "out": str(out),
        "entries": len(sums.sums),
        "datasets": list(sums.datasets),
        "windows": len(calibration.windows),
        "context": options.context,
        "tokens": calibration.windows.size,
        "tokens_sha256": calibration.sha256,
        "kernels": dict(sums.kernels),
        "experts_without_input": sum(int((counts == 0).sum()) for counts in sums.counts.values()),
    }
    _report(summary, talk)


def _matrix_bytes(model: Model) -> int:
    """A square's sum in f32 for each column of each matrix, of every expert; the header is small beside it."""
    matrices = [each for each in model.tensors if each.layer is not None and len(each.shape) > 1 and not each.keep_f32]
    return sum(4 * (each.n_cols + 1) * (each.shape[0] if len(each.shape) > 2 else 1) for each in matrices)


def _merge(files: list[Path], out: Path, talk: Talk) -> None:
    from pocketquant.calibration.importance import merge_sums, read_sums, write_sums
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.llama.kernels import note_on_sum

    refuse_overwriting([out], files)
    parts = [read_sums(path) for path in files]
    sums = merge_sums(parts, [str(path) for path in files])
    if note := note_on_sum({str(path): part.kernels for path, part in zip(files, parts, strict=True)}):
        talk.say(f"note: {note}")
    write_sums(sums, out)
    summary = {
        "out": str(out),
        "entries": len(sums.sums),
        "datasets": list(sums.datasets),
        "windows": sums.n_chunks,
        "kernels": dict(sums.kernels),
        "context": sums.context,
    }
    _report(summary, talk)


def _report(summary: dict[str, Any], talk: Talk) -> None:
    talk.say(
        f"written: {summary['out']}: importance of {summary['entries']} tensors from {summary['windows']} windows of "
        f"{summary['context']} tokens"
    )
    if without := summary.get("experts_without_input"):
        talk.say(f"note: {without} experts' matrices saw no input; their columns will weigh alike")
    if talk.json:
        print_json(summary)
