"""What a source is taken for, and that its files are the same wherever they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint

from pocketquant import open_model, open_recipe, plan
from pocketquant.convert import open_checkpoint, repository
from pocketquant.convert.repository import check_digests, named_snapshot, small_files, weight_files
from pocketquant.convert.safetensors import LocalFile, read_safetensors_header
from pocketquant.convert.snapshot import local_snapshot
from pocketquant.convert.sources import Repository, find_repository
from pocketquant.errors import OutputError, SourceError


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Qwen/Qwen3.5-4B", Repository("hf", "Qwen/Qwen3.5-4B", None)),
        ("Qwen/Qwen3.5-4B@v1.0", Repository("hf", "Qwen/Qwen3.5-4B", "v1.0")),
        ("hf://Qwen/Qwen3.5-4B@refs/pr/7", Repository("hf", "Qwen/Qwen3.5-4B", "refs/pr/7")),
        ("ms://Qwen/Qwen3.5-4B@master", Repository("ms", "Qwen/Qwen3.5-4B", "master")),
        ("Qwen3.5-4B", None),
        ("./Qwen/Qwen3.5-4B", None),
        ("/models/Qwen3.5-4B", None),
        ("../Qwen3.5-4B", None),
        ("~/Qwen3.5-4B", None),
        ("a/b/c", None),
        ("a\\b", None),
        ("a/b@", None),
        ("a/../b", None),
        ("", None),
    ],
)
def test_what_names_a_repository(source: str, expected: Repository | None) -> None:
    assert find_repository(source) == expected


@pytest.mark.parametrize("source", ["https://huggingface.co/a/b", "hf://a", "hf://a/b/c.gguf", "s3://a/b", "hf://a/b@"])
def test_addresses_that_name_no_repository_are_refused(source: str) -> None:
    with pytest.raises(SourceError, match=r"names no repository; give hf://org/name or ms://org/name"):
        open_model(source)


def test_a_path_that_exists_is_local_and_so_is_every_path_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org/name").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    assert find_repository("org/name") is None
    assert find_repository(Path("org/other")) is None
    assert len(open_model("org/name").tensors) == len(open_model(checkpoint).tensors)


def test_one_safetensors_file_beside_its_config(checkpoint: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / checkpoint.name)
    np.save(folder / "other.npy", np.ones(3))
    (folder / "stray.safetensors").write_bytes(b"not looked at")
    ours, expected = open_model(folder / "model.safetensors"), open_model(checkpoint)
    assert ours.metadata == expected.metadata
    for mine, theirs in zip(ours.tensors, expected.tensors, strict=True):
        assert np.array_equal(mine.rows(0, mine.n_rows), theirs.rows(0, theirs.n_rows))


def test_one_shard_of_several_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", n_shards=3)
    with pytest.raises(SourceError, match=r"is one of 3 shards; give the folder"):
        open_model(folder / "model-00002-of-00003.safetensors")


def test_a_file_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", n_shards=2)
    (folder / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(SourceError, match="does not name this file"):
        open_model(folder / "extra.safetensors")


def test_an_index_that_names_one_file_is_fine(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    names = [tensor.name for tensor in read_safetensors_header(folder / "model.safetensors")]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_model(folder / "model.safetensors").metadata == open_model(folder).metadata


def test_which_files_of_a_repository_are_fetched() -> None:
    sizes: dict[str, int | None] = {
        "config.json": 1,
        "README.md": 1,
        "tokenizer.json": 1,
        "vocab.json": 1,
        "chat_template.jinja": 1,
        "additional_chat_templates/tool.jinja": 1,
        "original/config.json": 1,
        "../../etc/passwd.json": 1,
        ".hidden.json": 1,
        "pytorch_model.bin": 1,
        "b.safetensors": 1,
        "a.safetensors": 1,
        "sub/c.safetensors": 1,
        "..safetensors": 1,
    }
    assert small_files("hf://a/b", sizes) == [
        "config.json",
        "README.md",
        "tokenizer.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ]
    assert weight_files("hf://a/b", sizes) == ["a.safetensors", "b.safetensors"]


def test_repositories_that_hold_no_checkpoint_are_refused() -> None:
    with pytest.raises(SourceError, match=r"hf://a/b: no config\.json.*it holds x\.gguf"):
        small_files("hf://a/b", {"x.gguf": 1})
    with pytest.raises(SourceError, match=r"hf://a/b: no \*\.safetensors file"):
        weight_files("hf://a/b", {"config.json": 1, "pytorch_model.bin": 1})
    with pytest.raises(SourceError, match=r"does not say how large(.|\n)*a\.safetensors"):
        weight_files("hf://a/b", {"a.safetensors": None})
    with pytest.raises(SourceError, match=r"larger files than a checkpoint has(.|\n)*tokenizer\.json: 999999999 bytes"):
        small_files("hf://a/b", {"config.json": 1, "tokenizer.json": 999_999_999})
    with pytest.raises(SourceError, match=r"more or larger files"):
        small_files("hf://a/b", {"config.json": 1} | {f"{i}.json": 1 for i in range(300)})


def test_errors_name_the_repository_instead_of_the_temporary_folder(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "0123abcd")
    (folder / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"^hf://org/Tiny-1M/config\.json: broken JSON") as caught:
        with named_snapshot(folder, "Tiny-1M", "hf://org/Tiny-1M", local_snapshot(folder).weights) as snapshot:
            open_model(snapshot.folder)
    assert "pocketquant-" not in str(caught.value)


@dataclass(frozen=True)
class ListedFile(LocalFile):
    """Weights that a hub has listed with an ETag; their folder says nothing of them."""

    etag: str = ""


def test_plans_of_repositories_differ_by_what_the_hub_lists(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "0123abcd")

    def digest(etag: str) -> str:
        weights = {"model.safetensors": ListedFile(folder / "model.safetensors", etag=etag)}
        with named_snapshot(folder, "Tiny-1M", "hf://org/Tiny-1M", weights) as snapshot:
            return plan(open_checkpoint(snapshot), open_recipe("q8_0")).digest

    assert digest("a") == digest("a") != digest("b")


def test_files_that_differ_from_their_digest_are_listed(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode())
    right = "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"  # of "b"
    check_digests(tmp_path, {"b": right, "c": None})
    with pytest.raises(SourceError, match=r"delete them(.|\n)*a: expected 3e23.*\n.*c: expected 3e23"):
        check_digests(tmp_path, {"a": right, "b": right, "c": right})


def test_no_room_is_said_before_anything_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"takes 1,000,000,000,000,000,000 bytes more and the disk has"):
        repository.check_room(tmp_path / "new", 10**18)


def test_small_neighbours_of_a_layer_are_read_together_and_others_are_not(tmp_path: Path) -> None:
    sizes = {
        "model.embed_tokens.weight": 64,
        "model.layers.0.a": 8,
        "model.layers.0.b": 16,
        "model.layers.0.large": 2 << 20,
        "model.layers.0.z": 8,
        "model.layers.1.a": 8,
        "model.norm.weight": 8,
        "visual.merger.weight": 8,
    }
    header, at, extents = {}, 0, {}

    class Recorder:
        """A file that remembers which part each tensor is read with."""

        def __init__(self, raw: bytes, extent: tuple[int, int] | None = None) -> None:
            self.raw, self.extent = raw, extent
            self.size = len(raw) + sum(sizes.values())

        def read(self, offset: int, nbytes: int) -> np.ndarray:
            return np.frombuffer(self.raw[offset : offset + nbytes], np.uint8)

        def within(self, start: int, stop: int) -> Recorder:
            return Recorder(self.raw, (start - self.data, stop - self.data))

        @property
        def data(self) -> int:
            return len(self.raw)

    for name, nbytes in sizes.items():
        header[name] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header).encode()
    for tensor in read_safetensors_header(Recorder(len(raw).to_bytes(8, "little") + raw)):
        extents[tensor.name] = tensor.file.extent
    begin = 64 + 24 + (2 << 20)
    assert extents == {
        "model.embed_tokens.weight": (0, 64),
        "model.layers.0.a": (64, 88),
        "model.layers.0.b": (64, 88),
        "model.layers.0.large": (88, begin),
        "model.layers.0.z": (begin, begin + 8),
        "model.layers.1.a": (begin + 8, begin + 16),
        "model.norm.weight": (begin + 16, begin + 24),
        "visual.merger.weight": (begin + 24, begin + 32),
    }
