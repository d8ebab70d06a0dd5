"""A Hugging Face checkpoint, local or on a hub -> `Model`.

Everything is checked on names, shapes and JSON before any weight is read: the architecture is known, every tensor has
its rule and every rule its tensor, every shape is the one the config implies.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

from pocketquant.architectures import architecture_of_class
from pocketquant.convert.adapter import Adapter
from pocketquant.convert.adapter_merge import merge_adapter
from pocketquant.convert.mapping import is_tied, map_tensors
from pocketquant.convert.metadata import model_metadata
from pocketquant.convert.mlx import refuse_mlx_quantized, undo_mlx_layout
from pocketquant.convert.mtp import MtpMode, check_mode, find_mtp, note_mtp, without_trunk
from pocketquant.convert.quantized import dequantize_table
from pocketquant.convert.safetensors import StoredTensor, read_safetensors_header
from pocketquant.convert.snapshot import INDEX, Snapshot, local_snapshot
from pocketquant.convert.tokenizer import read_tokenizer
from pocketquant.errors import ArchitectureError, SourceError, listing
from pocketquant.files import read_json
from pocketquant.gguf_file import describe_folder
from pocketquant.model import Model

_HEADERS_AT_ONCE = 8  # a hub takes a moment to answer, and a big model has a hundred shards


def open_checkpoint(
    source: Path | str | Snapshot, *, mtp: MtpMode = "sidecar", adapter: Adapter | None = None
) -> Model:
    """Opens a folder with config.json, tokenizer files and safetensors; reads no weights.

    Args:
        source: the checkpoint.
        mtp: "embed" takes a multi-token-prediction block in, where there is one; "sidecar" and "drop" leave it out
            (`open_mtp` opens the sidecar).
        adapter: what to merge into the weights as they are read.

    Raises:
        SourceError: files missing, truncated or contradicting themselves.
        ArchitectureError: unknown class, tensors missing, unknown or of another shape (all listed).
        TokenizerError: a tokenizer that no runtime implements, or one that does not fit the embedding.
    """
    check_mode(mtp)
    model = _open(source, mtp, adapter, sidecar=False)
    assert model is not None
    return model


def open_mtp(source: Path | str | Snapshot, *, adapter: Adapter | None = None) -> Model | None:
    """Opens the multi-token-prediction block of a checkpoint as a file of its own; None if there is none.

    The model holds the block, and the embedding, last norm and head that it shares with the trunk.

    Raises:
        SourceError, ArchitectureError, TokenizerError: as `open_checkpoint`.
    """
    return _open(source, "sidecar", adapter, sidecar=True)


def _open(source: Path | str | Snapshot, mode: MtpMode, adapter: Adapter | None, *, sidecar: bool) -> Model | None:
    snapshot = source if isinstance(source, Snapshot) else local_snapshot(Path(source))
    folder = snapshot.folder
    config = _read_object(folder / "config.json")
    text_config = config.get("text_config", config)
    if not isinstance(text_config, dict):
        raise SourceError(f"{folder / 'config.json'}: text_config is no object")
    architecture = architecture_of_class(_class_name(config, folder))
    sizes = architecture.read_sizes(text_config)
    kinds = architecture.layer_kinds(text_config)
    notes: list[str] = []
    table = read_tensor_table(snapshot)
    refuse_mlx_quantized(config, table, folder)
    stored = dequantize_table(table, config, folder, notes)
    architecture, stored = undo_mlx_layout(architecture, sizes, stored, notes, with_mtp=mode != "drop")
    if adapter is not None:
        tied = is_tied(config, text_config, stored, [])
        stored = merge_adapter(stored, adapter, tied, architecture.dropped, notes)
    block = None if mode == "drop" else find_mtp(stored, sizes["n_layer"])
    if sidecar and block is None:
        return None
    note_mtp(block, text_config, mode, notes)
    if block and sidecar:
        kinds, stored = (), without_trunk(stored, block)
    taken = block if sidecar or mode == "embed" else None
    if taken:
        sizes = {**sizes, "n_mtp": 1}
    tied = is_tied(config, text_config, stored, notes)
    tensors = map_tensors(architecture, sizes, kinds, stored, tied, notes, taken)
    n_weights = sum(prod(tensor.shape) for tensor in tensors)
    expert_weights = sum(prod(tensor.shape[1:]) for tensor in tensors if len(tensor.shape) == 3)
    described = describe_folder(folder, n_weights, sizes.get("n_expert", 0), expert_weights)
    metadata = {
        **model_metadata(architecture, text_config, sizes, described),
        **read_tokenizer(folder, sizes["n_vocab"], config),
    }
    files = (*snapshot.files, *(adapter.files if adapter is not None else ()))
    return Model(architecture.name, metadata, tensors, sizes, tuple(notes), files)


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise SourceError(f"{path}: no JSON object")
    return value


def _class_name(config: Mapping[str, Any], folder: Path) -> str:
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise ArchitectureError(f"{folder / 'config.json'}: 'architectures' names no model class")
    return classes[0]


def read_tensor_table(snapshot: Snapshot) -> dict[str, StoredTensor]:
    """Name -> place of every tensor of `model.safetensors`, or of the shards that the index names.

    Raises:
        SourceError: no safetensors, shards missing, or an index that contradicts the shards.
    """
    folder, files = snapshot.folder, snapshot.weights
    index_path = folder / INDEX
    if not index_path.exists():
        if len(files) != 1:
            found = "no *.safetensors file" if not files else f"{len(files)} *.safetensors files and no index"
            raise SourceError(f"{folder}: {found}; expected model.safetensors, or shards with {index_path.name}")
        return {tensor.name: tensor for file in files.values() for tensor in read_safetensors_header(file)}
    weight_map = _read_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError(f"{index_path}: weight_map is missing or no object of names")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise SourceError(f"{index_path}: shards outside the folder:\n{listing(outside)}")
    missing = [name for name in names if name not in files]
    if missing:
        raise SourceError(f"{folder}: shards named in the index are missing; download them:\n{listing(missing)}")
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        headers = list(pool.map(read_safetensors_header, [files[name] for name in names]))
    stored: dict[str, StoredTensor] = {}
    shards_of: dict[str, list[str]] = {}
    for shard, header in zip(names, headers, strict=True):
        for tensor in header:
            stored[tensor.name] = tensor
            shards_of.setdefault(tensor.name, []).append(shard)
    problems = _find_contradictions(weight_map, shards_of)
    if problems:
        raise SourceError(
            f"{index_path}: the index and the shards contradict each other, so nobody knows which numbers are meant; "
            f"download all of them again, from one revision, or save the checkpoint anew:\n{listing(problems)}"
        )
    return stored


def _find_contradictions(weight_map: Mapping[str, str], shards_of: Mapping[str, list[str]]) -> list[str]:
    """What an index (tensor name -> shard) says otherwise than the shards themselves (name -> all that have it)."""
    problems = []
    for name, shards in shards_of.items():
        stated = weight_map.get(name)
        if len(shards) > 1:
            problems.append(f"{name}: in {' and in '.join(shards)}; the index says {stated or 'nothing of it'}")
        elif stated is None:
            problems.append(f"{name}: in {shards[0]}, not in the index")
        elif stated != shards[0]:
            problems.append(f"{name}: in {shards[0]}, the index says {stated}")
    missing = [
        f"{name}: not in {shard}, nor in any other" for name, shard in weight_map.items() if name not in shards_of
    ]
    return missing + problems
