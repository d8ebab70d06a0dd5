"""Splitting: shards as llama.cpp's gguf-split writes them, within the limit, all or none, and back byte for byte."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, text_config, weights_for

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.errors import OutputError, PocketquantError, SourceError
from pocketquant.gguf_file.reading import read_header, read_shards
from pocketquant.gguf_file.shards import join_file, parse_size, split_file, split_plan
from pocketquant.gguf_file.writing import write_together
from pocketquant.model import Plan

LIMIT = 1_000_000


@pytest.fixture(scope="module")
def planned(checkpoint: Path) -> Plan:
    return plan(open_model(checkpoint), open_recipe("bf16"))


@pytest.fixture(scope="module")
def whole(planned: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    write(planned, path)
    return path


@pytest.fixture(scope="module")
def shards(planned: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    files = split_plan(planned, folder / "model.gguf", LIMIT)
    write_together(files)
    return [path for _, path in files]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512M", 512_000_000),
        ("2GB", 2_000_000_000),
        ("1.5GiB", 1_610_612_736),
        ("300k", 300_000),
        ("4096", 4096),
        ("7 MB", 7_000_000),
        ("1tib", 1 << 40),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "M", "-1", "0", "0.1", "1e9", "2XB", "512MM", "1.2.3G", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(OutputError, match="no size"):
        parse_size(text)


def test_shards_hold_the_model_within_the_limit(planned: Plan, shards: list[Path], whole: Path) -> None:
    count = len(shards)
    assert count > 3
    assert [path.name for path in shards] == [f"model-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    headers = [read_header(path) for path in shards]
    split_keys = ["split.no", "split.tensors.count", "split.count"]
    assert list(headers[0].metadata) == [*planned.metadata, *split_keys]
    for number, (path, header) in enumerate(zip(shards, headers, strict=True)):
        stated = [(header.metadata[key].kind, header.metadata[key].value) for key in split_keys]
        assert stated == [("u16", number), ("i32", len(planned.tensors)), ("u16", count)]
        assert number == 0 or list(header.metadata) == split_keys
        assert path.stat().st_size <= LIMIT
    names = [tensor.name for header in headers for tensor in header.tensors]
    assert names == [item.tensor.name for item in planned.tensors]
    # Every file but the last is full: the first tensor of the next one would not have fitted.
    for path, following in zip(shards, headers[1:], strict=False):
        assert path.stat().st_size + following.tensors[0].nbytes > LIMIT - 200


def test_planned_sizes_are_the_files(planned: Plan, shards: list[Path]) -> None:
    files = split_plan(planned, shards[0].with_name("model.gguf"), LIMIT)
    assert [part.file_bytes for part, _ in files] == [path.stat().st_size for path in shards]


def test_gguf_py_reads_every_shard(shards: list[Path], whole: Path) -> None:
    expected = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(whole).tensors}
    read = {tensor.name: np.array(tensor.data) for path in shards for tensor in gguf.GGUFReader(path).tensors}
    assert expected.keys() == read.keys()
    assert all(np.array_equal(values, read[name]) for name, values in expected.items())


def test_first_shard_opens_the_whole_model(shards: list[Path], whole: Path) -> None:
    ours, expected = open_model(shards[0]), open_model(whole)
    assert ours.metadata == expected.metadata
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in expected.tensors]
    for mine, other in zip(ours.tensors, expected.tensors, strict=True):
        assert (mine.role, mine.layer, mine.shape, mine.dtype) == (other.role, other.layer, other.shape, other.dtype)
        assert np.array_equal(mine.rows(0, mine.n_rows), other.rows(0, other.n_rows)), mine.name


def test_splitting_a_file_equals_writing_it_split(whole: Path, shards: list[Path], tmp_path: Path) -> None:
    paths = split_file(whole, tmp_path / "model.gguf", LIMIT)
    assert [path.name for path in paths] == [path.name for path in shards]
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in shards]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_shards(planned: Plan, shards: list[Path], threads: int, tmp_path: Path) -> None:
    files = split_plan(planned, tmp_path / "model.gguf", LIMIT)
    write_together(files, threads=threads)
    assert [path.read_bytes() for _, path in files] == [path.read_bytes() for path in shards]


def test_joined_file_is_the_file_before_splitting(shards: list[Path], whole: Path, tmp_path: Path) -> None:
    copied: list[int] = []
    join_file(shards[0], tmp_path / "joined.gguf", copied.append)
    assert (tmp_path / "joined.gguf").read_bytes() == whole.read_bytes()
    assert sum(copied) == sum(tensor.nbytes for tensor in read_header(whole).tensors)


@pytest.mark.parametrize("limit", [700_000, 2_500_000, 1 << 40])
def test_shards_are_split_anew(shards: list[Path], whole: Path, limit: int, tmp_path: Path) -> None:
    paths = split_file(shards[0], tmp_path / "other.gguf", limit)
    assert all(path.stat().st_size <= limit for path in paths)
    if limit > whole.stat().st_size:
        assert [path.name for path in paths] == ["other.gguf"]
        assert paths[0].read_bytes() == whole.read_bytes()
    else:
        join_file(paths[0], tmp_path / "joined.gguf")
        assert (tmp_path / "joined.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", [".", "..", "/", "folder"])
def test_shards_are_not_named_after_a_folder(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is a folder; give a file name"):
        split_file(whole, Path(name), LIMIT)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_fits_stays_one_plain_file(planned: Plan, tmp_path: Path) -> None:
    for limit in (None, planned.file_bytes):
        assert split_plan(planned, tmp_path / "model.gguf", limit) == [(planned, tmp_path / "model.gguf")]
    assert len(split_plan(planned, tmp_path / "model.gguf", planned.file_bytes - 1)) == 2


def test_quantized_shards_join_to_the_quantized_file(checkpoint: Path, tmp_path: Path) -> None:
    quantized = plan(open_model(checkpoint), open_recipe("q4_k_m"))
    write(quantized, tmp_path / "whole.gguf")
    files = split_plan(quantized, tmp_path / "part.gguf", 400_000)
    write_together(files)
    join_file(files[0][1], tmp_path / "joined.gguf")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


# ---------------------------------------------------------------- refused


def test_tensors_larger_than_a_file_are_all_named(planned: Plan, tmp_path: Path) -> None:
    limit = 200_000
    large = [item.tensor.name for item in planned.tensors if item.nbytes > limit]
    with pytest.raises(OutputError) as caught:
        split_plan(planned, tmp_path / "model.gguf", limit)
    assert "no tensor can be cut in two" in str(caught.value)
    assert all(name in str(caught.value) for name in large[:10])
    assert f"and {len(large) - 10} more" in str(caught.value)


def test_metadata_larger_than_a_file_is_refused(planned: Plan, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the metadata takes [\d,]+ bytes, more than the 2,000"):
        split_plan(planned, tmp_path / "model.gguf", 2_000)


def copy_of(shards: list[Path], folder: Path) -> list[Path]:
    return [Path(shutil.copy(path, folder)) for path in shards]


def test_missing_shards_are_listed(shards: list[Path], tmp_path: Path) -> None:
    paths = copy_of(shards, tmp_path)
    paths[1].unlink()
    paths[-1].unlink()
    with pytest.raises(SourceError, match=rf"2 of \d+ shards are missing:\n  {paths[1].name}\n  {paths[-1].name}"):
        open_model(paths[0])


def test_another_shard_than_the_first_is_refused(shards: list[Path]) -> None:
    with pytest.raises(SourceError, match=rf"shard 2 of \d+; open the first one, {shards[0].name}"):
        open_model(shards[1])


def test_renamed_shards_are_refused(shards: list[Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(shards[0], tmp_path / "model.gguf"))
    with pytest.raises(SourceError, match=r"runtimes find by names like model-00001-of-"):
        open_model(path)


def test_shards_of_another_model_are_refused(shards: list[Path], tmp_path: Path) -> None:
    paths = copy_of(shards, tmp_path)
    shutil.copy(paths[1], paths[2])
    with pytest.raises(SourceError, match=r"do not belong together:\n  .*says that it is number 1 (.|\n)*in more than"):
        open_model(paths[0])


def test_joining_what_is_whole_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nothing to join"):
        join_file(whole, tmp_path / "joined.gguf")
    assert not list(tmp_path.iterdir())


def test_files_that_would_not_come_back_are_refused(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "longer.gguf"
    path.write_bytes(whole.read_bytes() + b"\0" * 32)
    with pytest.raises(SourceError, match="laid out in another way"):
        split_file(path, tmp_path / "model.gguf", LIMIT)


@pytest.mark.parametrize("at", ["blk.0.ffn_up.weight", "blk.3.ffn_down.weight"])
def test_all_shards_appear_or_none(at: str, tmp_path: Path) -> None:
    weights = weights_for(text_config())
    _, layer, name, _ = at.split(".")
    weights[f"model.layers.{layer}.mlp.{name.removeprefix('ffn_')}_proj.weight"][3, 5] = np.nan
    broken = plan(open_model(make_checkpoint(tmp_path / "c", weights=weights)), open_recipe("bf16"))
    out = tmp_path / "out"
    out.mkdir()
    before = out / "model-00001-of-00006.gguf"
    before.write_bytes(b"what stood here")
    files = split_plan(broken, out / "model.gguf", LIMIT)
    assert before in [path for _, path in files]
    with pytest.raises(PocketquantError, match="non-finite"):
        write_together(files)
    assert list(out.iterdir()) == [before]
    assert before.read_bytes() == b"what stood here"


@pytest.mark.parametrize("kind", ["mmproj", "adapter", "imatrix"])
def test_what_llama_cpp_reads_from_one_file_is_not_split(kind: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "clip")
    writer.add_type(kind)
    writer.add_tensor("a", np.arange(4096, dtype=np.float32).reshape(64, 64))
    writer.add_tensor("b", np.arange(4096, dtype=np.float32).reshape(64, 64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = (tmp_path / "one.gguf").stat().st_size
    with pytest.raises(OutputError, match=r"from one file alone; allow more"):
        split_file(tmp_path / "one.gguf", tmp_path / "two.gguf", size - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["one.gguf"]
    assert split_file(tmp_path / "one.gguf", tmp_path / "two.gguf", size) == [tmp_path / "two.gguf"]


# ---------------------------------------------------------------- against gguf-split


def plain_gguf(path: Path) -> None:
    """A file that gguf-py writes, of no architecture of ours.

    No tensor has one row: gguf-split writes such a shape with one dimension, and we leave it as it is.
    """
    writer = gguf.GGUFWriter(path, "any")
    writer.add_array("any.words", ["one", "", "drei"])
    writer.add_array("any.numbers", [1.5, -2.0])
    writer.add_bool("any.flag", True)
    for i in range(8):
        writer.add_tensor(f"blk.{i}.weight", np.arange(76800 - 2 * i, dtype=np.float32).reshape(2, -1) + i)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# sha256 of what `llama-gguf-split --split-max-size 1M plain.gguf shard` makes of plain_gguf (llama.cpp b10359).
GGUF_SPLIT = (
    "91a02cf6cda2cc09a217dfddc8c3798dd885fd83e2b4b1ae8f90ce69836abc74",
    "14e30df0705b47e73e358cace88474c36dc69871142a32e911909fe840414c13",
    "936a8d8f388ffa24df9480a6844f557b87fcf3f3520822dab951c63b1dd45d01",
)


def test_shards_equal_gguf_splits(tmp_path: Path) -> None:
    plain_gguf(tmp_path / "plain.gguf")
    paths = split_file(tmp_path / "plain.gguf", tmp_path / "shard.gguf", LIMIT)
    assert tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths) == GGUF_SPLIT
    join_file(paths[0], tmp_path / "joined.gguf")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_the_digests_are_gguf_splits(tmp_path: Path) -> None:
    program = shutil.which("llama-gguf-split")
    if program is None:
        pytest.skip("no llama-gguf-split on PATH")
    plain_gguf(tmp_path / "plain.gguf")
    command = [program, "--split-max-size", "1M", tmp_path / "plain.gguf", tmp_path / "shard"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    paths = sorted(tmp_path.glob("shard-*.gguf"))
    assert tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths) == GGUF_SPLIT
    assert len(read_shards(paths[0])) == len(paths)
    join_file(paths[0], tmp_path / "joined.gguf")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
