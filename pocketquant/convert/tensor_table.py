"""Which safetensors files of a checkpoint are read, and where in them every tensor lies.

The choice is transformers': a file that config.json's `transformers_weights` names, else model.safetensors, else the
shards of the index. A save into the folder of an older one leaves the older index, or the older single file, beside the
new weights (transformers 5.24, `modeling_utils.py` `_get_resolved_checkpoint_files`, `save_pretrained`).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketquant.convert.folder import ADAPTER_WEIGHTS, INDEX, SINGLE, named
from pocketquant.convert.safetensors import StoredTensor, read_safetensors_header
from pocketquant.convert.snapshot import Snapshot
from pocketquant.errors import SourceError, listing
from pocketquant.files.small import is_present, read_object

_HEADERS_AT_ONCE = 8  # a hub takes a moment to answer, and a big model has a hundred shards


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's weights.

    Attributes:
        names: in their order.
        index: the index that names them, None for a single file.
        weight_map: the index's tensor name -> file name.
        notes: why these, where others lie beside them.
    """

    names: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


def choose_weights(snapshot: Snapshot, config: Mapping[str, Any]) -> WeightFiles:
    """Decides which of a folder's safetensors are the model.

    Raises:
        SourceError: no safetensors, several and no index, an index that is none, shards missing, or a name in
            config.json that is none of the folder's.
    """
    folder = snapshot.folder
    files = [name for name in snapshot.weights if name not in ADAPTER_WEIGHTS]
    explicit = config.get("transformers_weights")
    if explicit is not None and not snapshot.is_one_file:
        return _chosen_by_config(snapshot, explicit)
    if SINGLE in files:
        return WeightFiles((SINGLE,), *_index_beside(snapshot))
    if is_present(folder / INDEX):
        return _shards_of(snapshot, INDEX)
    if len(files) == 1:
        return WeightFiles((files[0],))
    if not files and snapshot.weights:
        raise SourceError(
            f"{folder}: holds an adapter ({', '.join(snapshot.weights)}) and no weights of a model; give the base "
            "model as the source and this folder with --adapter"
        )
    found = "no *.safetensors file" if not files else f"{len(files)} *.safetensors files and no index"
    raise SourceError(f"{folder}: {found}; expected {SINGLE}, or shards with {INDEX}")


def _chosen_by_config(snapshot: Snapshot, name: Any) -> WeightFiles:
    key = f"{snapshot.folder / 'config.json'}: transformers_weights {str(name)[:80]!r}"
    if not isinstance(name, str) or Path(name).name != name:
        raise SourceError(f"{key}: no name of a file in the folder; take the key out, or name one")
    notes = (f"config.json's transformers_weights names {name}: read, as transformers does",)
    if name.endswith(".safetensors.index.json"):
        found = _shards_of(snapshot, name)
        return WeightFiles(found.names, name, found.weight_map, notes)
    if name not in snapshot.weights:
        raise SourceError(f"{key}: the folder has no such safetensors file; take the key out, or download the file")
    return WeightFiles((name,), notes=notes)


def _index_beside(snapshot: Snapshot) -> tuple[str | None, None, tuple[str, ...]]:
    """The index beside a single file if it is the file's own, and a note if it is another save's."""
    path = snapshot.folder / INDEX
    if snapshot.is_one_file or not is_present(path):
        return None, None, ()
    try:
        weight_map = read_object(path).get("weight_map")
    except SourceError:  # transformers does not look at it
        weight_map = None
    shards = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if shards == [SINGLE]:
        return INDEX, None, ()
    if SINGLE in shards:
        others = named([name for name in shards if name != SINGLE])
        note = (
            f"{SINGLE} is read alone, as transformers does, though {INDEX} names it together with {others}: what only "
            f"those hold is left out. If all of them are meant, give {SINGLE} another name, in the index too"
        )
        return None, None, (note,)
    there = [name for name in shards if name in snapshot.weights]
    names = f"names {len(shards)} other files, {len(there)} of them there" if shards else "names no files"
    note = (
        f"{SINGLE} is read, as transformers does; {INDEX} beside it {names}: it is of another save. If that one is "
        f"meant, take {SINGLE} away"
    )
    return None, None, (note,)


def _shards_of(snapshot: Snapshot, index: str) -> WeightFiles:
    folder, path = snapshot.folder, snapshot.folder / index
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError(f"{path}: weight_map is missing or no object of names")
    names = tuple(sorted(set(weight_map.values())))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise SourceError(f"{path}: shards outside the folder:\n{listing(outside)}")
    missing = [name for name in names if name not in snapshot.weights]
    if missing:
        others = [name for name in snapshot.weights if name not in names and name not in ADAPTER_WEIGHTS]
        hint = f"; beside it lies {named(others)}, which the index does not name" if others else ""
        raise SourceError(f"{folder}: shards named in the index are missing; download them{hint}:\n{listing(missing)}")
    return WeightFiles(names, index, weight_map)


def read_tensor_table(snapshot: Snapshot, chosen: WeightFiles) -> dict[str, StoredTensor]:
    """Name -> place of every tensor of the chosen files.

    Raises:
        SourceError: a broken file, or an index that contradicts the shards.
    """
    files = [snapshot.weights[name] for name in chosen.names]
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        headers = list(pool.map(read_safetensors_header, files))
    stored: dict[str, StoredTensor] = {}
    shards_of: dict[str, list[str]] = {}
    for shard, header in zip(chosen.names, headers, strict=True):
        for tensor in header:
            stored[tensor.name] = tensor
            shards_of.setdefault(tensor.name, []).append(shard)
    problems = [] if chosen.weight_map is None else _find_contradictions(chosen.weight_map, shards_of)
    if problems:
        raise SourceError(
            f"{snapshot.folder / (chosen.index or INDEX)}: the index and the shards contradict each other, so nobody "
            "knows which numbers are meant; download all of them again, from one revision, or save the checkpoint "
            f"anew:\n{listing(problems)}"
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
