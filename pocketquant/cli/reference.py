"""`pocketquant reference`: keeps what a full-precision model says about a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pocketquant.cli.screen import print_json, say, size, step_progress


def make_pack(
    model: Path,
    text: list[str],
    out: Path,
    *,
    context: int,
    chunks: int | None,
    positions: bool,
    top_k: int,
    with_head: bool,
    threads: int | None,
    gpu_layers: int,
    resume: bool,
    dry_run: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Says what the pack will take and makes it."""
    from pocketquant.eval.kinship import quantized_reference
    from pocketquant.eval.reference import PackSettings, make_reference, plan_reference
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.texts.embedded import read_texts

    texts = read_texts(text)
    refuse_overwriting([out], [model, *(each.path for each in texts)])
    settings = PackSettings(context, chunks, positions, top_k, with_head, threads, gpu_layers, resume)
    plan = plan_reference(model, texts, settings)
    kept = plan.pack_bytes - plan.head_bytes
    matrix = f" and {size(plan.head_bytes)} for the output matrix" if plan.head_bytes else ""
    say(
        f"{out}: {plan.positions} positions in {plan.windows} windows, at most {size(kept)}{matrix}; "
        f"{100 * kept / plan.base_bytes:.2g} % of llama-perplexity's base file ({size(plan.base_bytes)})",
        quiet=quiet,
    )
    if dry_run:
        if json:
            print_json(asdict(plan), of="plan")
        return
    with step_progress(out.name, quiet=quiet) as advance:
        pack = make_reference(model, texts, out, settings, progress=advance)
    header, nbytes = pack.header, out.stat().st_size
    floor = header.floor
    how = f"{header.top} tokens per position" if header.top else f"hidden states as {header.coding}"
    say(
        f"written: {size(nbytes)}, {how}, {floor.kld_mean:.1g} nats from the reference itself (at most "
        f"{floor.kld_max:.1g} at one of {floor.positions} positions); moves divergences by {floor.shift:.1g}",
        quiet=quiet,
    )
    if header.quantized:
        say(f"note: {quantized_reference(header.model.name, header.quantized)}", quiet=quiet)
    if header.top:
        say(
            f"note: divergences against it are lower bounds; about {100 * floor.captured:.0f} % of a small one shows",
            quiet=quiet,
        )
    elif "head" not in pack.sections:
        say(f"note: comparisons need {header.model.name} beside it, for its output matrix", quiet=quiet)
    if json:
        print_json({"out": str(out), "file_bytes": nbytes, "base_bytes": plan.base_bytes, **asdict(header)})
