"""Folders with the weights of two saves: in each, transformers loads NEW, which the peer tests ask it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from checkpoint_maker import make_checkpoint, text_config, weights_for, write_safetensors

OLD, NEW = weights_for(text_config(), seed=0), weights_for(text_config(), seed=5)


def change_config(folder: Path, **changes: object) -> None:
    """Replaces keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def file_beside_older_shards(folder: Path) -> None:
    make_checkpoint(folder, weights=OLD, n_shards=3)
    write_safetensors(folder / "model.safetensors", NEW)


def file_beside_an_older_index(folder: Path) -> None:
    file_beside_older_shards(folder)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()


def file_beside_a_broken_index(folder: Path) -> None:
    make_checkpoint(folder, weights=NEW)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.no')


def file_with_an_index_of_its_own(folder: Path) -> None:
    make_checkpoint(folder, weights=NEW)
    index = {"metadata": {}, "weight_map": dict.fromkeys(NEW, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def file_that_an_index_names_with_others(folder: Path) -> None:
    make_checkpoint(folder, weights=NEW)
    write_safetensors(folder / "extra.safetensors", OLD)
    weight_map = dict.fromkeys(NEW, "model.safetensors") | {"model.norm.weight": "extra.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def file_that_the_config_names(folder: Path) -> None:
    make_checkpoint(folder, weights=OLD)
    write_safetensors(folder / "tuned.safetensors", NEW)
    change_config(folder, transformers_weights="tuned.safetensors")


def index_that_the_config_names(folder: Path) -> None:
    make_checkpoint(folder, weights=NEW, n_shards=3)
    (folder / "model.safetensors.index.json").rename(folder / "tuned.safetensors.index.json")
    write_safetensors(folder / "model.safetensors", OLD)
    change_config(folder, transformers_weights="tuned.safetensors.index.json")


def file_beside_a_variant_and_another_programs(folder: Path) -> None:
    make_checkpoint(folder, weights=NEW)
    for name in ("model.fp16.safetensors", "consolidated.safetensors"):
        write_safetensors(folder / name, OLD)


def shards_beside_a_stray_one(folder: Path) -> None:
    make_checkpoint(folder, weights=NEW, n_shards=2)
    write_safetensors(folder / "model-00001-of-00007.safetensors", OLD)


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "file beside older shards": (
        file_beside_older_shards,
        "names 3 other files, 3 of them there: it is of another save",
    ),
    "file beside an older index": (file_beside_an_older_index, "names 3 other files, 0 of them there"),
    "file beside a broken index": (file_beside_a_broken_index, "beside it names no files: it is of another save"),
    "file with an index of its own": (file_with_an_index_of_its_own, ""),
    "file that an index names with others": (
        file_that_an_index_names_with_others,
        "model.safetensors is read alone, as transformers does, though model.safetensors.index.json names it together "
        "with extra.safetensors: what only those hold is left out",
    ),
    "file that the config names": (
        file_that_the_config_names,
        "passed over (weights of another save, or not the file that was named): model.safetensors",
    ),
    "index that the config names": (index_that_the_config_names, "transformers_weights names tuned.safetensors.index"),
    "file beside a variant": (
        file_beside_a_variant_and_another_programs,
        "passed over (not the weights that transformers loads): consolidated.safetensors, model.fp16.safetensors",
    ),
    "shards beside a stray one": (
        shards_beside_a_stray_one,
        "passed over (shards of another save): model-00001-of-00007.safetensors",
    ),
}
"""What makes the folder, and what has to be noted; "" where nothing is."""
