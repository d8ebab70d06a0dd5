"""Paths that are odd but allowed, and what lies under them: named for what they are, in one line, as long as may be."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_maker import make_checkpoint

import pocketquant
from pocketquant import escaping
from pocketquant.convert.adapter import open_adapter
from pocketquant.convert.sources import open_model
from pocketquant.errors import OutputError, PocketquantError, RecipeError, SourceError
from pocketquant.escaping import as_lines, note_name
from pocketquant.files.leftovers import hidden_name, hidden_prefix, holding, work_folder
from pocketquant.files.replacing import hidden_beside, refuse_overwriting, replacing
from pocketquant.files.small import read_bytes
from pocketquant.llama.library import check_loadable
from pocketquant.quant.recipe_text import open_recipe

COMMAND = str(Path(sys.executable).with_name("pocketquant"))


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A path of each kind that is neither file nor folder."""
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    return {"pipe": tmp_path / "pipe", "socket": tmp_path / "socket", "device": Path("/dev/zero")}


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_called_what_it_is(kind: str, odd: dict[str, Path]) -> None:
    for read in (open_model, open_adapter, check_loadable, open_recipe, lambda path: read_bytes(path, 100)):
        with pytest.raises(PocketquantError, match=rf"{odd[kind]}: cannot be read: it is a {kind}; only regular"):
            read(str(odd[kind]) if read is open_recipe else odd[kind])  # type: ignore[operator]


def test_a_file_in_place_of_an_adapter_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match="is a file; give the folder"):
        open_adapter(tmp_path / "adapters.safetensors")


# ---------------------------------------------------------------- line ends in names


def test_a_noted_name_is_one_line_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(escaping, "_names", set())
    message = "x/a\nb/config.json: bad:\n  one\n  two"
    assert as_lines(message) == message
    note_name("--text=n=x/a\nb")
    assert as_lines(message) == "x/a\\nb/config.json: bad:\n  one\n  two"
    assert str(SourceError(message)) == as_lines(message)
    note_name("plain")
    assert as_lines("plain") == "plain"


def test_a_path_with_line_ends_and_escapes_takes_one_line_of_an_error(tmp_path: Path) -> None:
    name = "a\x1b[2Jb\nerror: fake"
    make_checkpoint(tmp_path / name)
    (tmp_path / name / "config.json").write_text("{")
    for arguments in (["inspect", name], ["convert", name, "-o", "y.gguf"], ["gate", name, "--limits", name]):
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith("error: a\\x1b[2Jb\\nerror: fake")
        assert "\x1b[2J" not in result.stderr
        assert "\nerror: fake" not in result.stderr
        assert result.stdout == ""


def test_a_file_with_line_ends_in_a_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(escaping, "_names", set())
    folder = make_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a\nb.safetensors")
    (folder / "a\nb.safetensors").write_bytes(b"x")
    with pytest.raises(SourceError) as caught:
        open_model(folder)
    assert f"{folder}/a\\nb.safetensors" in str(caught.value)


# ---------------------------------------------------------------- where outputs go


@pytest.mark.parametrize(
    "arguments",
    [
        "convert missing --out nodir/x",
        "adapter missing --base missing --out nodir/x",
        "imatrix missing --text missing --out nodir/x",
        "calibrate missing --out nodir/x",
        "sensitivity missing --text missing --out nodir/x",
        "reference missing --text missing --out nodir/x",
        "tune missing --reference missing --text missing --out nodir/x",
        "smoke missing --reference missing --out nodir/x",
        "report missing --out nodir/x",
        "gate missing --limits missing --junit nodir/x",
    ],
)
def test_a_missing_folder_is_noticed_before_anything_is_opened(arguments: str, tmp_path: Path) -> None:
    result = run(*arguments.split(), cwd=tmp_path)
    assert result.returncode == 2
    assert f"nodir/x: cannot be written: there is no folder {tmp_path}/nodir; make it first" in result.stderr
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refuse_overwriting([tmp_path / "new" / "new" / "x"], [], makes_folder=True)
    for makes_folder in (False, True):
        with pytest.raises(OutputError, match=r"file/new/x: cannot be written: .*/file is no folder"):
            refuse_overwriting([tmp_path / "file" / "new" / "x"], [], makes_folder=makes_folder)


def test_a_recipe_for_a_vision_tower_that_is_none_is_refused_without_a_tower(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m")
    result = run("convert", "m", "--mmproj", "NONSENSE", "--dry-run", cwd=tmp_path)
    assert result.returncode == 2
    assert "NONSENSE: neither a recipe nor a file" in result.stderr
    assert run("convert", "m", "--mmproj", "none", "--dry-run", cwd=tmp_path).returncode == 0


# ---------------------------------------------------------------- long names

LONG = ["n" * 250 + ".gguf", "n" * 237, "é" * 125 + ".gguf", "𝄞" * 62 + ".gguf"]


@pytest.mark.parametrize("name", LONG)
def test_a_name_as_long_as_may_be(name: str, tmp_path: Path) -> None:
    assert 237 <= len(os.fsencode(name)) <= 255
    target = tmp_path / name
    for content in ("old", "new"):
        with replacing(target) as temporary, holding(target), work_folder(target) as folder:
            hidden = hidden_beside(target, "unfinished")
            with replacing(hidden) as other:
                other.write_text("x")
            assert len({hidden.name, temporary.name, folder.name, *os.listdir(tmp_path)}) >= 5
            temporary.write_text(content)
        assert target.read_text() == content
        hidden.unlink()
        assert os.listdir(tmp_path) == [name]


def test_what_a_killed_run_left_of_a_long_name_goes(tmp_path: Path) -> None:
    name, other = "n" * 250 + ".gguf", "n" * 250 + "-gguf"
    left = [hidden_prefix(each, ".partial") + "abcd1234.partial" for each in (name, other)]
    assert all(len(each) <= 255 for each in left)
    for each in left:
        (tmp_path / each).write_text("left")
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert sorted(os.listdir(tmp_path)) == sorted([name, left[1]])


def test_short_names_stay_what_they_were() -> None:
    assert hidden_name("model.gguf", ".state") == ".model.gguf.state"
    assert hidden_prefix("model.gguf", ".partial") == ".model.gguf."
    assert re.fullmatch(r"\.n{235}~[0-9a-f]{16}\.x", hidden_name("n" * 253, ".x"))


# ---------------------------------------------------------------- byte order marks


def test_toml_with_a_byte_order_mark(tmp_path: Path) -> None:
    recipe = (Path(pocketquant.__file__).parent / "quant" / "recipes" / "q8_0.toml").read_bytes()
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf" + recipe)
    assert open_recipe(str(tmp_path / "mine.toml")).rules == open_recipe("q8_0").rules
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf[")
    with pytest.raises(RecipeError, match="not valid TOML"):
        open_recipe(str(tmp_path / "mine.toml"))
