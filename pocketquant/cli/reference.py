"""`reference`: keeps what a full-precision model says about a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketquant.cli.cost import say_pace
from pocketquant.cli.options import Chunks, Compute, Context, CostOnly, Resume, Talk, option
from pocketquant.cli.screen import print_json, size

if TYPE_CHECKING:
    from pocketquant.eval.packs.pack import Pack
    from pocketquant.pace import Progress


@dataclass(frozen=True)
class PackOptions:
    """What a pack holds, and how it is made."""

    context: Context = 512
    chunks: Chunks = None
    positions: Annotated[
        bool, option("--positions", "", "Keep windows from their beginning, for eval --positions.")
    ] = False
    top_k: Annotated[int, option("--top-k", "N", "Keep the N most likely tokens only: 64 for CI.", min=0)] = 0
    with_head: Annotated[
        bool, option("--with-head", "", "Put the output matrix into the pack, so that it needs no other file.")
    ] = False
    resume: Resume = False
    dry_run: CostOnly = False


def reference(
    model: Annotated[Path, typer.Argument(metavar="GGUF|DIR", help="Full precision: a GGUF or a checkpoint's folder.")],
    text: Annotated[list[str], option("--text", "FILE|NAME=FILE|domains", "As for eval; once for each text.")],
    out: Annotated[Path, option("--out -o", "FILE", "The pack to write: NAME.pqref.")],
    *,
    options: PackOptions,
    compute: Compute,
    talk: Talk,
) -> None:
    """Keep what full precision says about texts, to compare with later."""
    from pocketquant.eval.reference import PackSettings, make_reference, plan_reference
    from pocketquant.files.leftovers import work_folder
    from pocketquant.files.replacing import check_target, refuse_overwriting
    from pocketquant.pace import try_out
    from pocketquant.texts.embedded import read_texts

    if options.top_k and options.with_head:
        raise typer.BadParameter("a pack of top tokens needs no output matrix", param_hint="--with-head")
    texts = read_texts(text)
    refuse_overwriting([out], [model, *(each.path for each in texts)])
    settings = PackSettings(
        options.context,
        options.chunks,
        options.positions,
        options.top_k,
        options.with_head,
        compute.threads,
        compute.gpu_layers,
        options.resume and not options.dry_run,
    )
    plan = plan_reference(model, texts, settings)
    kept = plan.pack_bytes - plan.head_bytes
    matrix = f" and {size(plan.head_bytes)} for the output matrix" if plan.head_bytes else ""
    talk.say(
        f"{out}: {plan.positions} positions in {plan.windows} windows, at most {size(kept)}{matrix}; "
        f"{100 * kept / plan.base_bytes:.2g} % of llama-perplexity's base file ({size(plan.base_bytes)})"
    )

    def make(path: Path, progress: Progress) -> Pack:
        return make_reference(model, texts, path, settings, progress=progress)

    if options.dry_run:
        with work_folder(check_target(out)) as folder:
            pace = try_out(lambda progress: make(folder / "trial.pqref", progress))
        say_pace(pace, "windows", plan.pack_bytes, talk, asdict(plan))
        return
    with talk.steps(out.name, "windows") as advance:
        pack = make(out, advance)
    _report(out, pack, talk)
    if talk.json:
        header = asdict(pack.header)
        print_json({"out": str(out), "file_bytes": out.stat().st_size, "base_bytes": plan.base_bytes, **header})


def _report(out: Path, pack: Pack, talk: Talk) -> None:
    from pocketquant.eval.kinship import quantized_reference

    header, floor = pack.header, pack.header.floor
    how = f"{header.top} tokens per position" if header.top else f"hidden states as {header.coding}"
    talk.say(
        f"written: {size(out.stat().st_size)}, {how}, {floor.kld_mean:.1g} nats from the reference itself (at most "
        f"{floor.kld_max:.1g} at one of {floor.positions} positions); moves divergences by {floor.shift:.1g}"
    )
    if header.top:
        talk.say(
            f"note: divergences against it are lower bounds; about {100 * floor.captured:.0f} % of a small one shows"
        )
    elif "head" not in pack.sections:
        talk.say(f"note: comparisons need {header.model.name} beside it, for its output matrix")
    if header.quantized:
        talk.say(f"note: {quantized_reference(header.model.name, header.quantized)}")
