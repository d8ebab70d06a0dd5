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
        bool, option("--positions", "", "Keep each window from its beginning, as `eval --positions` needs it.")
    ] = False
    top_k: Annotated[
        int,
        option(
            "--top-k",
            "N",
            "Keep only the N most likely tokens of each position, such as 64 for CI; 0 keeps all.",
            min=0,
        ),
    ] = 0
    with_head: Annotated[
        bool, option("--with-head", "", "Put the output matrix into the pack, which then needs no GGUF beside it.")
    ] = False
    resume: Resume = False
    dry_run: CostOnly = False


def reference(
    model: Annotated[
        Path, typer.Argument(metavar="GGUF|DIR", help="The model in full precision: a GGUF, or a checkpoint's folder.")
    ],
    text: Annotated[
        list[str],
        option(
            "--text",
            "FILE|NAME=FILE|domains",
            "UTF-8 text, or conversations in .jsonl; domains: six embedded texts; may be repeated.",
        ),
    ],
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
        raise typer.BadParameter(
            "has no effect with --top-k: a pack of top tokens needs no output matrix", param_hint="--with-head"
        )
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
        f"{out}: {plan.positions} positions in {plan.windows} windows take at most {size(kept)}{matrix}, "
        f"{100 * kept / plan.base_bytes:.2g} % of llama-perplexity's base file ({size(plan.base_bytes)}); the pack's "
        "header is added"
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
        f"written: {out}: {size(out.stat().st_size)}, {how}; {floor.kld_mean:.1g} nats from the reference itself (at "
        f"most {floor.kld_max:.1g} at one of {floor.positions} positions), which changes the divergence measured at a "
        f"position by about {floor.shift:.1g}"
    )
    if header.top:
        talk.say(
            "note: divergences measured with this pack are lower bounds; of a small divergence about "
            f"{100 * floor.captured:.0f} % is seen"
        )
    elif "head" not in pack.sections:
        talk.say(f"note: comparisons need {header.model.name} beside the pack, for its output matrix")
    if header.quantized:
        talk.say(f"note: {quantized_reference(header.model.name, header.quantized)}")
