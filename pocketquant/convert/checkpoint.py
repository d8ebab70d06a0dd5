"""A Hugging Face checkpoint, local or on a hub -> `Model`.

Everything is checked on names, shapes and JSON before any weight is read: the architecture is known, every tensor has
its rule and every rule its tensor, every shape is the one the config implies.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from pocketquant.architectures import architecture_of_class
from pocketquant.architectures.qwen35_vision import PREFIXES as VISION_PREFIXES
from pocketquant.convert.adapter import Adapter
from pocketquant.convert.adapter_merge import merge_adapter, refuse_whole_on_mlx
from pocketquant.convert.description import describe_folder
from pocketquant.convert.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    list_entries,
    named,
    note_passed_over,
    refuse_versions,
)
from pocketquant.convert.kinds import read_config
from pocketquant.convert.mapping import is_tied, map_tensors
from pocketquant.convert.metadata import model_metadata
from pocketquant.convert.mlx import refuse_mlx_quantized, undo_mlx_layout
from pocketquant.convert.mtp import MtpMode, check_mode, find_mtp, note_mtp, without_trunk
from pocketquant.convert.quantized import dequantize_table
from pocketquant.convert.quantized.settings import settings_file
from pocketquant.convert.safetensors import StoredTensor
from pocketquant.convert.snapshot import Snapshot, local_snapshot
from pocketquant.convert.tensor_table import WeightFiles, choose_weights, read_tensor_table
from pocketquant.convert.tokenizer import read_tokenizer
from pocketquant.errors import ArchitectureError, SourceError
from pocketquant.files.small import read_object
from pocketquant.model import Model


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
    _refuse_adapter_inside(snapshot, adapter)
    config = read_config(folder)
    refuse_versions(folder / "config.json", config.get("configuration_files"), "config")
    text_config = config.get("text_config", config)
    if not isinstance(text_config, dict):
        raise SourceError(f"{folder / 'config.json'}: text_config is no object")
    architecture = architecture_of_class(_class_name(config, folder))
    sizes = architecture.read_sizes(text_config)
    kinds = architecture.layer_kinds(text_config)
    weights = choose_weights(snapshot, config)
    notes = list(weights.notes)
    table = read_tensor_table(snapshot, weights)
    notes += note_passed_over(snapshot.entries, _read_from(snapshot, config, weights, table, adapter))
    refuse_mlx_quantized(config, table, folder)
    stored = dequantize_table(table, config, folder, notes)
    as_trained = architecture
    architecture, stored = undo_mlx_layout(architecture, sizes, stored, notes, with_mtp=mode != "drop")
    if adapter is not None:
        if architecture is not as_trained:
            refuse_whole_on_mlx(adapter)
        notes += _note_beside_adapter(adapter, folder)
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
    try:
        tensors = map_tensors(architecture, sizes, kinds, stored, tied, notes, taken)
    except ArchitectureError as error:  # which files were read may be the reason
        raise ArchitectureError("\n".join([str(error), *weights.notes])) from error
    n_weights = sum(prod(tensor.shape) for tensor in tensors)
    expert_weights = sum(prod(tensor.shape[1:]) for tensor in tensors if len(tensor.shape) == 3)
    described = describe_folder(folder, n_weights, notes, sizes.get("n_expert", 0), expert_weights)
    metadata = {
        **model_metadata(architecture, text_config, sizes, described),
        **read_tokenizer(folder, sizes["n_vocab"], config, architecture.pre_tokenizers, notes),
    }
    files = (*snapshot.files, *(adapter.files if adapter is not None else ()))
    return Model(architecture.name, metadata, tensors, sizes, tuple(notes), files, snapshot.origin)


def _refuse_adapter_inside(snapshot: Snapshot, adapter: Adapter | None) -> None:
    """Weights and an adapter in one folder are one model to transformers with PEFT, and another one without it.

    Merging a leftover adapter into weights that it was merged into would apply it twice, so nobody's guess is right.
    """
    entries, folder = snapshot.entries, snapshot.folder
    weights = [name for name in ADAPTER_WEIGHTS if name in entries]
    if adapter is not None or snapshot.is_one_file or ADAPTER_CONFIG not in entries or not weights:
        return
    if "config.json" not in entries:
        base = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise SourceError(
            f"{folder}: an adapter (of {base!r:.120}) and no model; give its base model as the source and this folder "
            f"as the adapter: --adapter {folder}"
        )
    raise SourceError(
        f"{folder}: holds a model and an adapter, {weights[0]}; transformers merges it where PEFT is installed and "
        f"leaves it out elsewhere. To merge it, name its folder on this machine: --adapter {folder}; to leave it out, "
        f"take {ADAPTER_CONFIG} away"
    )


def _names_of(adapter: Adapter) -> set[str]:
    return {file.path.name for file in adapter.files}


def _note_beside_adapter(adapter: Adapter, folder: Path) -> list[str]:
    """What lies in an adapter's own folder besides: often a tokenizer and a template, which are not the model's."""
    if adapter.folder is None or adapter.folder == folder.resolve():
        return []
    others = [name for name in list_entries(adapter.folder) if name not in _names_of(adapter)]
    if not others:
        return []
    note = f"adapter {adapter.name}: passed over in its folder: {named(others)}"
    return [f"{note}; tokenizer and chat template are the base model's" if "tokenizer.json" in others else note]


def _read_from(
    snapshot: Snapshot,
    config: Mapping[str, Any],
    weights: WeightFiles,
    table: Mapping[str, StoredTensor],
    adapter: Adapter | None,
) -> set[str]:
    """Names of the files of the folder that are read, of those that not every checkpoint is read from."""
    read = {*weights.names, settings_file(config, snapshot.folder), *([weights.index] if weights.index else [])}
    if "chat_template.jinja" in snapshot.entries:
        read |= {"chat_template.jinja", "additional_chat_templates/"}
    else:
        read |= {"chat_template.json"}
    if any(name.startswith(VISION_PREFIXES) for name in table):
        read |= {"preprocessor_config.json", "processor_config.json"}
    if adapter is not None and adapter.folder == snapshot.folder.resolve():
        read |= _names_of(adapter)
    return read


def _class_name(config: Mapping[str, Any], folder: Path) -> str:
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise ArchitectureError(f"{folder / 'config.json'}: 'architectures' names no model class")
    return classes[0]
