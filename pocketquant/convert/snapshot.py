"""A checkpoint's files, wherever they are: the small ones in a folder, the weights as files to read ranges of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pocketquant.convert.safetensors import LocalFile, RangeFile
from pocketquant.errors import SourceError
from pocketquant.files import checkpoint_states, read_json
from pocketquant.unchanged import FileState, state_of

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Snapshot:
    """What a local folder, a single file and a repository on a hub all give.

    Attributes:
        folder: config.json, tokenizer, README and the index, as files; its name is the model's. For a repository it
            exists only while the checkpoint is being opened.
        weights: name -> every `*.safetensors` file there is. Tensors keep these, so they outlive the folder.
        files: all local files, as they were when the folder was opened.
    """

    folder: Path
    weights: Mapping[str, RangeFile]
    files: tuple[FileState, ...] = ()


def local_snapshot(path: Path) -> Snapshot:
    """A folder with all its safetensors, or one `.safetensors` file with the small files beside it.

    Raises:
        SourceError: neither, or the file is one shard of several.
    """
    if path.is_dir():
        files = checkpoint_states(path)
        weights = {file.path.name: LocalFile(file.path, file) for file in files if file.path.suffix == ".safetensors"}
        return Snapshot(path, dict(sorted(weights.items())), files)
    if path.suffix != ".safetensors" or not path.is_file():
        raise SourceError(
            f"{path}: no such folder; give a checkpoint folder (config.json, tokenizer.json, *.safetensors), one "
            ".safetensors file beside its config.json, a repository (org/name, hf://org/name@revision, "
            "ms://org/name@revision) or a GGUF file"
        )
    index = path.parent / INDEX
    if index.is_file():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        shards = {name for name in weight_map.values() if isinstance(name, str)} if isinstance(weight_map, dict) else ()
        if path.name in shards:
            if len(shards) > 1:
                raise SourceError(f"{path}: is one of {len(shards)} shards; give the folder {path.parent}")
            return _one_file(path)
        raise SourceError(f"{path}: {INDEX} beside it does not name this file; move it to a folder of its own")
    return _one_file(path)


def _one_file(path: Path) -> Snapshot:
    files = [file for file in checkpoint_states(path.parent) if file.path.suffix != ".safetensors" or file.path == path]
    weights = {path.name: LocalFile(path, state_of(path))}
    return Snapshot(path.parent, weights, tuple(files))
