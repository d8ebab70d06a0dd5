"""`pocketquant adapter`: plans the file, writes it unless it is only a plan, says what it holds."""

from __future__ import annotations

from pathlib import Path

from pocketquant.cli.screen import print_json, print_table, say, size


def convert_adapter(
    folder: Path, base: str, out: Path | None, type_name: str, max_size: str | None, *, json: bool, quiet: bool
) -> None:
    """A PEFT folder -> GGUF adapter; `out` None prints the plan and writes nothing."""
    from pocketquant.convert import open_model
    from pocketquant.convert.adapter import open_adapter
    from pocketquant.convert.adapter_gguf import plan_adapter
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.gguf_file.shards import check_whole, parse_size
    from pocketquant.gguf_file.writing import write

    if out is not None:
        refuse_overwriting([out], [folder, base])
    planned = plan_adapter(open_adapter(folder), open_model(base), type_name)
    if max_size:
        check_whole("adapter", out or folder, planned.file_bytes, parse_size(max_size))
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
        say(f"will write {out}: {size(planned.file_bytes)}, {len(entries)} matrices for {base}", quiet=quiet)
        write(planned, out)
        say(f"written: {out}: {size(planned.file_bytes)}", quiet=quiet)
    if json:
        print_json({"out": str(out), **summary} if out else summary)
    elif out is None:
        print_table(
            ["tensor", "shape", "type", "bytes"],
            [
                [item.tensor.name, " x ".join(map(str, item.tensor.shape)), item.format.name, f"{item.nbytes:,}"]
                for item in planned.tensors
            ],
        )
        print(f"\n{planned.file_bytes:,} bytes in all")
