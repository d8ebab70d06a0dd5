"""`convert ADAPTER --base SRC`, and `adapter`: a LoRA adapter as a GGUF of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.options import DryRun, Out, Talk, option
from pocketquant.cli.screen import print_json, print_table, size

_TYPES = ("f32", "f16", "bf16")


def adapter(
    folder: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA adapter, from PEFT or mlx-lm.")],
    base: Annotated[str, option("--base", "SRC", "The model that the adapter belongs to: checkpoint or GGUF.")],
    *,
    out: Out = None,
    type: Annotated[str, option("--type", "f32|f16|bf16", "Number format of the matrices.")] = "f32",
    split_max_size: Annotated[
        str | None, option("--split-max-size", "SIZE", "Refuse to write a larger file; an adapter cannot be split.")
    ] = None,
    dry_run: DryRun = False,
    talk: Talk,
) -> None:
    """Convert a LoRA adapter to a GGUF, as `convert --base`.

    llama.cpp loads it beside the base model (--lora).
    """
    from pocketquant.convert import open_model
    from pocketquant.convert.adapter import open_adapter
    from pocketquant.convert.adapter_gguf import plan_adapter
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.gguf_file.shards import check_whole, parse_size
    from pocketquant.gguf_file.writing import write

    if type.lower() not in _TYPES:
        raise typer.BadParameter("must be f32, f16 or bf16", param_hint="--type")
    if out is None and not dry_run:
        raise typer.BadParameter("name the file to write, or use --dry-run", param_hint="--out")
    out = None if dry_run else out
    if out is not None:
        refuse_overwriting([out], [folder, base])
    planned = plan_adapter(open_adapter(folder), open_model(base), type.lower())
    if split_max_size:
        check_whole("adapter", out or folder, planned.file_bytes, parse_size(split_max_size))
    entries = [
        {"name": item.tensor.name, "shape": list(item.tensor.shape), "type": item.format.name, "nbytes": item.nbytes}
        for item in planned.tensors
    ]
    summary = {
        "file_bytes": planned.file_bytes,
        "alpha": planned.metadata["adapter.lora.alpha"].value,
        "tensors": entries,
    }
    if out is not None:
        talk.say(f"will write {out}: {size(planned.file_bytes)}, {len(entries)} matrices for {base}")
        write(planned, out)
        talk.say(f"written: {out}: {size(planned.file_bytes)}")
    if talk.json:
        print_json({"out": str(out), **summary} if out else summary)
    elif out is None:
        rows = [
            [item.tensor.name, " x ".join(map(str, item.tensor.shape)), item.format.name, f"{item.nbytes:,}"]
            for item in planned.tensors
        ]
        print_table(["tensor", "shape", "type", "bytes"], rows)
        print(f"\n{planned.file_bytes:,} bytes in all")
