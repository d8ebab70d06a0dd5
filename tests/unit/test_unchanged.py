"""Sources that change while they are read: refused by name, and nothing is replaced."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.errors import SourceError
from pocketquant.files.unchanged import check_unchanged, state_of
from pocketquant.gguf_file import reading as gguf_file
from pocketquant.gguf_file.header import encode_table
from pocketquant.gguf_file.reading import read_header
from pocketquant.gguf_file.shards import split_file
from pocketquant.model import Value

CHANGES = ("overwritten", "replaced", "removed")


def change(path: Path, how: str) -> None:
    """Changes a file, whose size stays."""
    data = bytearray(path.read_bytes())
    data[-4:] = b"\1\2\1\2"
    if how == "overwritten":
        path.write_bytes(data)
    elif how == "removed":
        path.unlink()
    else:
        times = path.stat()
        other = path.with_name("other")
        other.write_bytes(data)
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
        other.replace(path)


def once(what: Callable[[], None]) -> Callable[[int], None]:
    """A progress callback that does something the first time."""
    done: list[bool] = []

    def step(_nbytes: int) -> None:
        if not done:
            done.append(True)
            what()

    return step


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "source" / checkpoint.name))


def refused(source: Path, changing: Path, how: str, out: Path) -> None:
    """Writes `source` to `out`, and has `changing` changed after the first chunk."""
    out.write_bytes(b"good")
    planned = plan(open_model(source), open_recipe("q8_0"))
    with pytest.raises(SourceError, match=changing.name):
        write(planned, out, threads=1, on_bytes=once(lambda: change(changing, how)))
    assert out.read_bytes() == b"good"
    assert [path for path in out.parent.iterdir() if ".partial" in path.name] == []


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_checkpoint_that_changes_meanwhile_is_refused(name: str, how: str, source: Path, tmp_path: Path) -> None:
    refused(source, source / name, how, tmp_path / "out.gguf")


@pytest.mark.parametrize("how", CHANGES)
def test_a_gguf_that_changes_meanwhile_is_refused(how: str, source: Path, tmp_path: Path) -> None:
    write(plan(open_model(source), open_recipe("f32")), tmp_path / "in.gguf")
    refused(tmp_path / "in.gguf", tmp_path / "in.gguf", how, tmp_path / "out.gguf")


def test_the_model_card_may_change(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("a card")
    planned = plan(open_model(source), open_recipe("q8_0"))
    write(planned, tmp_path / "out.gguf", on_bytes=once(lambda: change(source / "README.md", "overwritten")))


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_is_split_meanwhile(how: str, source: Path, tmp_path: Path) -> None:
    whole = tmp_path / "in.gguf"
    write(plan(open_model(source), open_recipe("f32")), whole)
    with pytest.raises(SourceError, match=r"in\.gguf"):
        split_file(whole, tmp_path / "out.gguf", 1 << 20, once(lambda: change(whole, how)))
    assert list(tmp_path.glob("out*")) == []


def test_all_that_changed_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text("1234")
    states = [state_of(path) for path in paths]
    check_unchanged(states)
    change(paths[0], "overwritten")
    paths[2].unlink()
    with pytest.raises(SourceError) as caught:
        check_unchanged(states)
    assert str(paths[0]) in str(caught.value)
    assert str(paths[1]) not in str(caught.value)
    assert str(paths[2]) in str(caught.value)


def test_on_another_machine_there_is_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1234")
    assert pickle.loads(pickle.dumps(state_of(tmp_path / "a"))) is None


# ---------------------------------------------------------------- a header that is cut while it is read


def big_header(path: Path) -> Path:
    metadata = {"general.architecture": Value("str", "x"), "a": Value("str[]", ["word"] * 400_000)}
    path.write_bytes(encode_table(metadata, []))
    return path


class Cutting(FileIO):
    """A file that is cut in half after the first megabyte was read."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        if self.tell() > 4:
            os.truncate(self.name, os.path.getsize(self.name) // 2)
        return data


def test_a_header_that_is_cut_short_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = big_header(tmp_path / "a.gguf")
    assert len(read_header(path).metadata["a"].value) == 400_000
    monkeypatch.setattr(gguf_file, "open_regular", Cutting)
    with pytest.raises(SourceError, match=r"a\.gguf: ends before byte \d+; was it changed"):
        read_header(path)


def test_a_header_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = big_header(tmp_path / "a.gguf")
    monkeypatch.setattr(gguf_file, "_MAX_ITEMS", 399_999)
    with pytest.raises(SourceError, match="an array of 400000 strings"):
        read_header(path)
    monkeypatch.setattr(gguf_file, "_MAX_ITEMS", 400_000)
    monkeypatch.setattr(gguf_file, "_MAX_HEADER_BYTES", 2 << 20)
    with pytest.raises(SourceError, match="a header of more than 2097152 bytes"):
        read_header(path)
