"""`pocketquant imatrix`: makes an importance matrix, or adds several up."""

from __future__ import annotations

from pathlib import Path

from pocketquant.cli.screen import print_json, say, step_progress


def make_matrix(
    gguf: Path,
    text: str,
    out: Path,
    *,
    mtp: Path | None,
    context: int,
    chunks: int | None,
    seed: int,
    threads: int | None,
    gpu_layers: int,
    resume: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Runs the model over the text; the state of an unfinished run lies beside `out` as `.NAME.unfinished`."""
    from pocketquant.calibration.imatrix import collect_importance
    from pocketquant.calibration.importance import write_sums
    from pocketquant.files.interrupts import resumable
    from pocketquant.files.leftovers import holding
    from pocketquant.files.replacing import hidden_beside, refuse_overwriting
    from pocketquant.texts.calibration import CalibrationSettings

    refuse_overwriting([out], [gguf, text, mtp])
    state = hidden_beside(out, "unfinished")
    how = f"finished windows are kept in {state}; the same command with --resume goes on from there"
    with holding(state), resumable(state, how):
        with step_progress(out.name, quiet=quiet) as advance:
            sums, calibration = collect_importance(
                gguf,
                text,
                CalibrationSettings(context, chunks, threads, gpu_layers, seed),
                mtp=mtp,
                state=state,
                resume=resume,
                progress=advance,
            )
        write_sums(sums, out)
        state.unlink(missing_ok=True)
    summary = {
        "out": str(out),
        "entries": len(sums.sums),
        "datasets": list(sums.datasets),
        "windows": len(calibration.windows),
        "context": context,
        "tokens": calibration.windows.size,
        "tokens_sha256": calibration.sha256,
        "kernels": dict(sums.kernels),
        "experts_without_input": sum(int((counts == 0).sum()) for counts in sums.counts.values()),
    }
    _report(summary, json=json, quiet=quiet)


def merge_matrices(files: list[Path], out: Path, *, json: bool, quiet: bool) -> None:
    """Adds matrices up."""
    from pocketquant.calibration.importance import merge_sums, read_sums, write_sums
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.llama.kernels import note_on_sum

    refuse_overwriting([out], files)
    parts = [read_sums(path) for path in files]
    sums = merge_sums(parts, [str(path) for path in files])
    write_sums(sums, out)
    if note := note_on_sum({str(path): part.kernels for path, part in zip(files, parts, strict=True)}):
        say(f"note: {note}", quiet=quiet)
    summary = {
        "out": str(out),
        "entries": len(sums.sums),
        "datasets": list(sums.datasets),
        "windows": sums.n_chunks,
        "context": sums.context,
        "kernels": dict(sums.kernels),
    }
    _report(summary, json=json, quiet=quiet)


def _report(summary: dict[str, object], *, json: bool, quiet: bool) -> None:
    say(
        f"written: {summary['out']}: importance of {summary['entries']} tensors from {summary['windows']} windows of "
        f"{summary['context']} tokens",
        quiet=quiet,
    )
    if without := summary.get("experts_without_input"):
        say(f"note: {without} experts' matrices saw no input; their columns will weigh alike", quiet=quiet)
    if json:
        print_json(summary)
