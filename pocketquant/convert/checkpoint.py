"""A local Hugging Face checkpoint -> `Model`.

Everything is checked on names, shapes and JSON before any weight is read: the architecture is known, every tensor has
its rule and every rule its tensor, every shape is the one the config implies.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from pocketquant.architectures import architecture_of_class
from pocketquant.convert.mapping import is_tied, map_tensors
from pocketquant.convert.metadata import model_metadata
from pocketquant.convert.safetensors import StoredTensor, read_safetensors_header
from pocketquant.convert.tokenizer import read_tokenizer
from pocketquant.errors import ArchitectureError, SourceError, listing
from pocketquant.files import read_json
from pocketquant.gguf_file import describe_folder
from pocketquant.model import Model


def open_checkpoint(source: Path | str) -> Model:
    """Opens a folder with config.json, tokenizer files and safetensors; reads no weights.

    Raises:
        SourceError: files missing, truncated or contradicting themselves.
        ArchitectureError: unknown class, tensors missing, unknown or of another shape (all listed).
        TokenizerError: a tokenizer that no runtime implements, or one that does not fit the embedding.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise SourceError(
            f"{folder}: no such folder; give a checkpoint folder (config.json, tokenizer.json, *.safetensors) or a "
            "GGUF file"
        )
    config = _read_object(folder / "config.json")
    text_config = config.get("text_config", config)
    if not isinstance(text_config, dict):
        raise SourceError(f"{folder / 'config.json'}: text_config is no object")
    architecture = architecture_of_class(_class_name(config, folder))
    _refuse_quantized(config, folder)
    sizes = architecture.read_sizes(text_config)
    kinds = architecture.layer_kinds(text_config)
    stored = read_tensor_table(folder)
    notes: list[str] = []
    tied = is_tied(config, text_config, stored, notes)
    tensors = map_tensors(architecture, sizes, kinds, stored, tied, notes)
    n_weights = sum(prod(tensor.shape) for tensor in tensors)
    metadata = {
        **model_metadata(architecture, text_config, sizes, describe_folder(folder, n_weights)),
        **read_tokenizer(folder, sizes["n_vocab"], config),
    }
    return Model(architecture.name, metadata, tensors, sizes, tuple(notes))


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


def _refuse_quantized(config: Mapping[str, Any], folder: Path) -> None:
    quantization = config.get("quantization_config") or config.get("quantization")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else "unnamed"
        raise SourceError(
            f"{folder}: the checkpoint is already quantized ({method}); convert the BF16, F16 or F32 checkpoint it was "
            "made from"
        )


def read_tensor_table(folder: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor of `model.safetensors`, or of the shards that the index names.

    Raises:
        SourceError: no safetensors, shards missing, or an index that contradicts the shards.
    """
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            found = "no *.safetensors file" if not files else f"{len(files)} *.safetensors files and no index"
            raise SourceError(f"{folder}: {found}; expected model.safetensors, or shards with {index_path.name}")
        return {tensor.name: tensor for tensor in read_safetensors_header(files[0])}
    weight_map = _read_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError(f"{index_path}: weight_map is missing or no object of names")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise SourceError(f"{index_path}: shards outside the folder:\n{listing(outside)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise SourceError(f"{folder}: shards named in the index are missing; download them:\n{listing(missing)}")
    stored = {tensor.name: tensor for name in names for tensor in read_safetensors_header(folder / name)}
    problems = [f"{name}: not in {shard}" for name, shard in weight_map.items() if name not in stored]
    problems += [f"{name}: in {stored[name].file}, not in the index" for name in stored if name not in weight_map]
    if problems:
        raise SourceError(f"{index_path}: the index and the shards contradict each other:\n{listing(problems)}")
    return stored
