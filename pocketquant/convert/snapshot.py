"""A checkpoint's files, wherever they are: the small ones in a folder, the weights as files to read ranges of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pocketquant.convert.folder import INDEX, SINGLE, list_entries
from pocketquant.convert.safetensors import LocalFile, RangeFile
from pocketquant.errors import SourceError
from pocketquant.files.reading import checkpoint_states
from pocketquant.files.small import is_present, kind_of, read_object, refuse_other
from pocketquant.files.unchanged import FileState, state_of


@dataclass(frozen=True)
class Snapshot:
    """What a local folder, a single file and a repository on a hub all give.

    Attributes:
        folder: config.json, tokenizer, README and the index, as files; its name is the model's. For a repository it
            exists only while the checkpoint is being opened.
        weights: name -> every `*.safetensors` file there is. Tensors keep these, so they outlive the folder.
        entries: names of everything in the folder or repository, from `list_entries` or `top_level`.
        is_one_file: the source was one safetensors file by its name, so nobody asked for others beside it.
        files: all local files, as they were when the folder was opened.
        origin: what tells the weights of a repository from others; a local folder's `files` do.
    """

    folder: Path
    weights: Mapping[str, RangeFile]
    entries: tuple[str, ...] = ()
    is_one_file: bool = False
    files: tuple[FileState, ...] = ()
    origin: tuple[str, ...] = ()


def local_snapshot(path: Path) -> Snapshot:
    """A folder with all its safetensors, or one `.safetensors` file with the small files beside it.

    Raises:
        SourceError: neither, or the file is one shard of several.
    """
    if kind_of(path) == "folder":
        files, entries = checkpoint_states(path), list_entries(path)
        known = {file.path.name: file for file in files}
        weights = {name: LocalFile(path / name, known.get(name)) for name in entries if name.endswith(".safetensors")}
        return Snapshot(path, weights, entries, files=files)
    refuse_other(path)
    if path.suffix != ".safetensors" or kind_of(path) != "file":
        raise SourceError(
            f"{path}: no such folder; give a checkpoint folder (config.json, tokenizer.json, *.safetensors), one "
            ".safetensors file beside its config.json, a repository (org/name, hf://org/name@revision, "
            "ms://org/name@revision) or a GGUF file"
        )
    beside = [file for file in checkpoint_states(path.parent) if file.path.suffix != ".safetensors"]
    state = state_of(path)
    weights = {path.name: LocalFile(path, state)}
    snapshot = Snapshot(path.parent, weights, list_entries(path.parent), is_one_file=True, files=(state, *beside))
    index = path.parent / INDEX
    if path.name != SINGLE and is_present(index):
        weight_map = read_object(index).get("weight_map")
        shards = {name for name in weight_map.values() if isinstance(name, str)} if isinstance(weight_map, dict) else ()
        if path.name in shards:
            if len(shards) > 1:
                raise SourceError(f"{path}: is one of {len(shards)} shards; give the folder {path.parent}")
            return snapshot
        raise SourceError(f"{path}: {INDEX} beside it does not name this file; move it to a folder of its own")
    return snapshot
