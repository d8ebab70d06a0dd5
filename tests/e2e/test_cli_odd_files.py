"""Odd files through the commands: pipes, names that are too long or no UTF-8, folders without permission."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_maker import make_checkpoint

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.cli.app import app
from pocketquant.errors import PocketquantError

COMMAND = [str(Path(sys.executable).with_name("pocketquant"))]
CAPBSET_DROP, DAC_OVERRIDE, DAC_READ_SEARCH = 24, 1, 2
"""prctl's option, and what lets root read what its permissions forbid (linux/prctl.h, linux/capability.h)."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a GGUF of it, a pipe, and a text whose name is no UTF-8."""
    folder = tmp_path_factory.mktemp("odd")
    model = open_model(make_checkpoint(folder / "cc"))
    write(plan(model, open_recipe("f32")), folder / "m.gguf")
    os.mkfifo(folder / "pipe")
    (folder / "c\udcff.txt").write_text("some words " * 500)
    (folder / ("n" * 255)).write_text("a name as long as it may be")
    return folder


@pytest.mark.parametrize("name", ["pipe", "c\udcff.txt", "n" * 300])
@pytest.mark.parametrize(
    "arguments",
    [
        "inspect {}",
        "check {}",
        "convert {} --out o.gguf",
        "eval {} --reference m.gguf --text m.gguf",
        "eval m.gguf --reference {} --text m.gguf",
        "eval m.gguf --reference m.gguf --text {} --context 32",
        "imatrix m.gguf --text {} --out o.gguf --context 32",
        "imatrix --merge {} --out o.gguf",
        "calibrate cc --text {} --out o.stats",
        "sensitivity m.gguf --text {} --out o.toml",
        "reference m.gguf --text {} --out o.pqref --context 32",
        "split {} --out o.gguf --split-max-size 1MB",
        "join {} --out o.gguf",
        "adapter {} --base cc --out o.gguf",
        "quantize cc --out o.gguf --imatrix {}",
        "quantize cc --out o.gguf --stats {}",
        "quantize cc --out o.gguf --recipe {}",
        "quantize cc --out o.gguf --recipe from:{}",
        "quantize cc --out o.gguf --sensitivity {} --target-size 10MB",
        "quantize cc --out o.gguf --chat-template {}",
        "quantize cc --out o.gguf --adapter {}",
        "gate {} --limits m.gguf",
        "gate cc/config.json --limits {}",
        "report {} --out o.html",
        "make cc --out o --text {}",
    ],
)
def test_refused_by_name_before_anything_is_done(
    arguments: str, name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: a hang or another exception than a PocketquantError would be seen just as well."""
    monkeypatch.chdir(place)
    before = sorted(os.listdir("."))
    with pytest.raises(PocketquantError) as caught:
        app(args=[word.format(name) for word in arguments.split()], prog_name="pocketquant")
    assert len(max(str(caught.value).split("\n"), key=len)) < 1100
    str(caught.value).encode()
    assert sorted(os.listdir(".")) == before


def test_a_text_whose_name_is_no_utf_8_as_json(place: Path) -> None:
    words = ["eval", "m.gguf", "--reference", "m.gguf", "--text", "c\udcff.txt", "--context", "32", "--json"]
    result = subprocess.run([*COMMAND, *words], cwd=place, capture_output=True)
    assert result.returncode == 2
    assert rb"c\udcff.txt: cannot be read: its name is no UTF-8; rename it" in result.stderr
    assert json.loads(result.stdout)["error"]["exit_code"] == 2


def drop_rights_of_root() -> None:
    libc = ctypes.CDLL(None)
    for right in (DAC_OVERRIDE, DAC_READ_SEARCH):
        libc.prctl(CAPBSET_DROP, right, 0, 0, 0)


@pytest.mark.parametrize(
    "words", [["inspect", "cc"], ["check", "cc/config.json"], ["convert", "cc", "--out", "o.gguf"]]
)
@pytest.mark.parametrize("mode", [0o600, 0o000])
def test_a_folder_without_permission(words: list[str], mode: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "cc")
    folder.chmod(mode)
    try:
        result = subprocess.run(
            [*COMMAND, *words], cwd=tmp_path, capture_output=True, text=True, preexec_fn=drop_rights_of_root
        )
        if os.geteuid() == 0 and result.returncode == 0:
            pytest.skip("root keeps its rights here")
    finally:
        folder.chmod(0o700)
    assert result.returncode == 2
    assert "Permission denied" in result.stderr
    assert "cc" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "cc", "--out", "shut/o.gguf"],
        ["make", "cc", "--out", "shut/new/o"],
        ["eval", "m.gguf", "--reference", "m.gguf", "--text", "none.txt", "--out", "shut/o.json"],
    ],
    ids=lambda words: words[0],
)
def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(words: list[str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "cc")
    (tmp_path / "m.gguf").write_bytes(b"no GGUF, and not looked at")
    (tmp_path / "none.txt").write_text("text")
    (tmp_path / "shut").mkdir(mode=0o500)
    result = subprocess.run(
        [*COMMAND, *words], cwd=tmp_path, capture_output=True, text=True, preexec_fn=drop_rights_of_root
    )
    if os.geteuid() == 0 and "no permission" not in result.stderr and os.listdir(tmp_path / "shut"):
        pytest.skip("root keeps its rights here")
    assert result.returncode == 2
    assert f"error: {words[-1]}" in result.stderr
    assert f"cannot be written: no permission to write in {tmp_path}/shut; give another place" in result.stderr
    assert "will write" not in result.stderr
