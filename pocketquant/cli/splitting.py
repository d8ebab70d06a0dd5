"""`pocketquant split` and `pocketquant join`: one GGUF in several files, and back."""

from __future__ import annotations

from pathlib import Path

from pocketquant.cli.screen import byte_progress, print_json, say, size


def split(file: Path, out: Path, max_size: str, *, json: bool, quiet: bool) -> None:
    """Splits a GGUF, or splits one anew, and says how large each file is."""
    from pocketquant.gguf_file.reading import read_shards
    from pocketquant.gguf_file.shards import parse_size, split_file

    total = sum(tensor.nbytes for _, header in read_shards(file) for tensor in header.tensors)
    with byte_progress(out.name, total, quiet=quiet) as advance:
        paths = split_file(file, out, parse_size(max_size), advance)
    _report(paths, json=json, quiet=quiet)


def join(file: Path, out: Path, *, json: bool, quiet: bool) -> None:
    """Joins the shards of a GGUF."""
    from pocketquant.gguf_file.reading import read_shards
    from pocketquant.gguf_file.shards import join_file

    total = sum(tensor.nbytes for _, header in read_shards(file) for tensor in header.tensors)
    with byte_progress(out.name, total, quiet=quiet) as advance:
        join_file(file, out, advance)
    _report([out], json=json, quiet=quiet)


def _report(paths: list[Path], *, json: bool, quiet: bool) -> None:
    files = [{"file": str(path), "file_bytes": path.stat().st_size} for path in paths]
    for path in paths:
        say(f"written: {path}: {size(path.stat().st_size)}", quiet=quiet)
    if json:
        print_json({"files": files})
