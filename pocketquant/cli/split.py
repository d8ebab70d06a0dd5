"""`split` and `join`: one GGUF in several files, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.options import OutFile, Talk, option
from pocketquant.cli.screen import print_json, size

ShardedFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="GGUF, or the first shard of a GGUF in several files.")
]


def split(
    file: ShardedFile,
    out: Annotated[Path, option("--out -o", "FILE", "Name of the result; shards are called NAME-00001-of-0000N.gguf.")],
    *,
    split_max_size: Annotated[
        str | None, option("--split-max-size", "SIZE", "Largest size of a shard: 512M, 2GB, 1.5GiB.")
    ] = None,
    join_shards: Annotated[bool, option("--join", "", "Join shards to the file that was split.")] = False,
    talk: Talk,
) -> None:
    """Split a GGUF into shards that llama.cpp loads, or join them.

    The weights stay as they are.
    """
    from pocketquant.gguf_file.shards import parse_size, split_file

    if join_shards and split_max_size is not None:
        raise typer.BadParameter("shards are joined to one file, whatever its size", param_hint="--split-max-size")
    if join_shards:
        join(file, out, talk)
        return
    if split_max_size is None:
        raise typer.BadParameter("give the largest size of a shard, or --join", param_hint="--split-max-size")
    with talk.bytes(out.name, _bytes_of(file)) as advance:
        paths = split_file(file, out, parse_size(split_max_size), advance)
    _report(paths, talk)


def join(file: ShardedFile, out: OutFile, talk: Talk) -> None:
    """Join the shards of a GGUF, as `split --join`."""
    from pocketquant.gguf_file.shards import join_file

    with talk.bytes(out.name, _bytes_of(file)) as advance:
        join_file(file, out, advance)
    _report([out], talk)


def _bytes_of(file: Path) -> int:
    from pocketquant.gguf_file.reading import read_shards

    return sum(tensor.nbytes for _, header in read_shards(file) for tensor in header.tensors)


def _report(paths: list[Path], talk: Talk) -> None:
    for path in paths:
        talk.say(f"written: {path}: {size(path.stat().st_size)}")
    if talk.json:
        print_json({"files": [{"file": str(path), "file_bytes": path.stat().st_size} for path in paths]})
