"""`eval --chats`, and `smoke`: a few chats, and what went wrong with the answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pocketquant.cli.options import Gguf, ReferenceGguf, mode_panel, option
from pocketquant.cli.screen import print_json, print_table
from pocketquant.cli.tasks import Run, note_quantized


@dataclass(frozen=True)
class ChatOptions:
    """How long the answers may be."""

    max_tokens: Annotated[
        int, option("--max-tokens", "N", "Cut answers off after this many tokens.", mode_panel("--chats"), min=1)
    ] = 256


def smoke(
    gguf: Gguf,
    reference: ReferenceGguf,
    options: ChatOptions,
    run: Run,
) -> None:
    """Compare answers to a few chats, as `eval --chats`."""
    from pocketquant.eval.tasks.smoke import PROMPTS, compare_smoke

    run.refuse_overwriting(gguf, reference)
    if run.dry_run:
        most = len(PROMPTS) * options.max_tokens
        run.talk.say(f"{len(PROMPTS)} prompts; each model writes at most {most} tokens")
        if run.talk.json:
            print_json({"prompts": len(PROMPTS), "written_tokens": most}, of="plan")
        return
    with run.talk.steps(gguf.name, "answers") as advance:
        found = compare_smoke(
            gguf,
            Path(reference),
            max_tokens=options.max_tokens,
            threads=run.compute.threads,
            gpu_layers=run.compute.gpu_layers,
            progress=advance,
        )
    run.keep(found)
    note_quantized(found, run.talk)
    if run.talk.json:
        return
    count = len(found.answers)
    rows = [
        [
            fault.replace("_", " "),
            f"{paired.model * count:.0f} of {count}",
            f"{paired.reference * count:.0f}",
            f"{paired.gained}",
            f"{paired.lost}",
            f"{paired.p_value:.2g}",
        ]
        for fault, paired in found.faults.items()
    ]
    print_table(["fault", gguf.name, "reference", "only in the file", "only in the reference", "p"], rows)
