"""Bad input through the command itself: a clear message, exit code 2, and nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, make_sparse_checkpoint, text_config, weights_for, write_safetensors

from pocketquant.demo import checkpoint_dir

COMMAND = [str(Path(sys.executable).with_name("pocketquant"))]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def truncated_shard(folder: Path) -> None:
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def with_header(path: Path, change: Callable[[dict[str, Any]], object], tail: bytes = b"") -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    change(header)
    raw = json.dumps({"__metadata__": metadata, **header}).encode().ljust(length)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :] + tail)


def lying_offsets(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        next(iter(header.values()))["data_offsets"] = [0, 2]

    with_header(folder / "model-00001-of-00003.safetensors", change)


def shifted_offsets(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        for item in header.values():
            item["data_offsets"] = [n + 2 for n in item["data_offsets"]]

    with_header(folder / "model-00001-of-00003.safetensors", change, tail=b"\0\0")


def trailing_bytes(folder: Path) -> None:
    with_header(folder / "model-00001-of-00003.safetensors", lambda header: None, tail=bytes(64))


def repeated_key(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    name, entry = next(item for item in json.loads(data[8 : 8 + length]).items() if item[0] != "__metadata__")
    raw = data[8 : 8 + length].rstrip().removesuffix(b"}") + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def wrong_shard_in_the_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.embed_tokens.weight"] = "model-00003-of-00003.safetensors"
    path.write_text(json.dumps(index))


def tensor_in_two_shards(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = "extra.safetensors"
    other = {"model.embed_tokens.weight": np.full((320, 256), 3, np.float32), "model.extra": np.ones(7, np.float32)}
    write_safetensors(folder / "extra.safetensors", other)
    path.write_text(json.dumps(index))


def epsilon_of_zero(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0}))


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))


def rewritten(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = weights_for(text_config())
    change(weights)
    shutil.rmtree(folder)
    make_checkpoint(folder, weights=weights)


def wrong_shape(folder: Path) -> None:
    rewritten(folder, lambda weights: weights.update({"model.norm.weight": np.ones(7, np.float32)}))


def unknown_tensor(folder: Path) -> None:
    rewritten(folder, lambda weights: weights.update({"model.layers.0.lora_A.weight": np.ones(7, np.float32)}))


def missing_tensor(folder: Path) -> None:
    rewritten(folder, lambda weights: weights.pop("model.layers.3.self_attn.k_norm.weight"))


def non_finite_weight(folder: Path) -> None:
    rewritten(folder, lambda weights: weights["model.layers.2.mlp.up_proj.weight"].__setitem__((3, 3), np.inf))


CASES = {
    missing_shard: "model-00002-of-00003.safetensors",
    truncated_shard: "truncated",
    lying_offsets: "data_offsets [0, 2] say 2",
    shifted_offsets: "the 2 before it belong to no tensor",
    trailing_bytes: "the last 64 of the file's",
    repeated_key: "header: keys twice, so nobody knows",
    wrong_shard_in_the_index: "embed_tokens.weight: in model-00001-of-00003.safetensors, the index says model-00003",
    tensor_in_two_shards: "model.embed_tokens.weight: in extra.safetensors and in model-00001-of-00003.safetensors",
    epsilon_of_zero: "rms_norm_eps: 0, expected a number above 0 and at most 1",
    unknown_architecture: "model class 'MambaForCausalLM' is not supported",
    wrong_shape: "model.norm.weight: BF16 [7], expected [n_embd=256]",
    unknown_tensor: "model.layers.0.lora_A.weight",
    missing_tensor: "model.layers.3.self_attn.k_norm.weight [64]",
    non_finite_weight: "model.layers.2.mlp.up_proj.weight rows 0 to 511: non-finite weight",
}


@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__)
def test_exit_code_2_a_clear_message_and_nothing_written(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", n_shards=3)
    damage(folder)
    out = tmp_path / "out"
    out.mkdir()
    result = run("quantize", folder, "--out", out / "model.gguf", "--recipe", "q8_0")
    assert result.returncode == 2
    assert CASES[damage] in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(out.iterdir()) == []


def test_unwritable_target(tmp_path: Path, checkpoint: Path) -> None:
    for target in ("/proc/model.gguf", tmp_path / "missing" / "model.gguf", tmp_path):
        result = run("convert", checkpoint, "--out", target)
        assert result.returncode == 2
        assert str(target) in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_device_or_a_pipe_is_no_target(dry: list[str], tmp_path: Path, checkpoint: Path) -> None:
    """Run as root, an output renamed to /dev/null would take the device's place."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for target in ("/dev/null", tmp_path / "pipe", tmp_path / "link"):
        result = run("convert", checkpoint, "--out", target, *dry)
        assert result.returncode == 2
        assert f"{target}: is a device or a pipe" in result.stderr
        assert "will write" not in result.stderr
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.readlink(tmp_path / "link") == "/dev/null"


def test_a_link_stays_and_leads_to_the_output(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.gguf").symlink_to("disk/model.gguf")
    assert run("convert", checkpoint, "--out", tmp_path / "link.gguf").returncode == 0
    assert os.readlink(tmp_path / "link.gguf") == "disk/model.gguf"
    assert os.listdir(tmp_path / "disk") == ["model.gguf"]
    assert run("inspect", tmp_path / "link.gguf").returncode == 0


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a file of each kind that commands read; nothing here is ever to change."""
    folder = make_checkpoint(tmp_path_factory.mktemp("own") / "cc")
    assert run("convert", folder, "--out", folder.parent / "x.gguf").returncode == 0
    assert (
        run("split", folder.parent / "x.gguf", "-o", folder.parent / "s.gguf", "--split-max-size", "2MB").returncode
        == 0
    )
    (folder.parent / "link.gguf").symlink_to("x.gguf")
    (folder.parent / "adapter").mkdir()
    for name in ("adapter/adapter_config.json", "text.txt", "m.gguf", "st.safetensors", "t.jinja", "r.toml", "r.json"):
        (folder.parent / name).write_text(name)
    return folder.parent


@pytest.mark.parametrize(
    "arguments",
    [
        "convert cc --out cc/model.safetensors",
        "convert cc --out cc/config.json --dry-run",
        "convert cc/model.safetensors --out cc/tokenizer.json",
        "convert cc --out t.jinja --chat-template t.jinja",
        "convert cc --out adapter/adapter_config.json --adapter adapter",
        "quantize x.gguf --out x.gguf",
        "quantize x.gguf --out cc/../x.gguf",
        "quantize link.gguf --out x.gguf",
        "quantize x.gguf --out link.gguf",
        "quantize s-00001-of-00003.gguf --out s-00002-of-00003.gguf",
        "quantize cc --out m.gguf --imatrix m.gguf",
        "quantize cc --out st.safetensors --stats st.safetensors",
        "quantize cc --out x.gguf --recipe from:x.gguf",
        "quantize cc --out r.toml --recipe r.toml",
        "quantize s-00001-of-00003.gguf --recipe bf16 --out s.gguf --split-max-size 2MB",
        "adapter adapter --base x.gguf --out x.gguf",
        "imatrix x.gguf --text text.txt --out x.gguf",
        "imatrix x.gguf --text text.txt --out text.txt",
        "imatrix --merge m.gguf x.gguf --out m.gguf",
        "calibrate cc --out cc/model.safetensors",
        "calibrate x.gguf --text text.txt --out text.txt",
        "calibrate --merge st.safetensors --out st.safetensors",
        "sensitivity cc --stats st.safetensors --out st.safetensors",
        "reference x.gguf --text text.txt --out text.txt",
        "report r.json --out r.json",
        "report r.json --out new.html --markdown r.json",
        "gate r.json --limits r.toml --junit r.toml",
        "tasks x.gguf --reference x.gguf --tasks t --out x.gguf",
        "smoke x.gguf --reference m.gguf --out m.gguf",
        "split s-00001-of-00003.gguf --split-max-size 2MB --out s.gguf",
        "join s-00001-of-00003.gguf --out s-00003-of-00003.gguf",
    ],
)
def test_no_output_over_its_own_input(arguments: str, own_files: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        files = (path.lstat() for path in sorted(own_files.rglob("*")))
        return {str(n): (each.st_ino, each.st_mtime_ns) for n, each in enumerate(files)}

    before = state()
    result = run(*arguments.split(), cwd=own_files)
    assert result.returncode == 2, result.stderr
    assert "would replace what it is made from" in result.stderr
    assert result.stdout == ""
    assert state() == before


def test_make_over_its_own_input(tmp_path: Path) -> None:
    """A file that is called what one of the outputs will be."""
    dry = json.loads(run("make", checkpoint_dir(), "--out", tmp_path, "--dry-run", "--json", "--recipe", "f32").stdout)
    source = tmp_path / dry["files"][0]["file"]
    assert run("convert", checkpoint_dir(), "--out", source, "--type", "f32").returncode == 0
    made = source.stat()
    result = run("make", source, "--out", tmp_path, "--recipe", "f32", "--imatrix", "none")
    assert result.returncode == 2
    assert "would replace what it is made from" in result.stderr
    assert (source.stat().st_ino, source.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    (tmp_path / "report.md").symlink_to("/dev/null")
    for extra in ([], ["--dry-run"]):
        result = run("make", checkpoint_dir(), "--out", tmp_path, "--recipe", "q8_0", *extra)
        assert result.returncode == 2
        assert (
            f"links where files will be written; remove them, or write elsewhere:\n  {tmp_path}/report.md"
            in result.stderr
        )


def test_the_plan_does_not_read_like_success(tmp_path: Path) -> None:
    weights = weights_for(text_config())
    weights["model.norm.weight"][3] = np.nan
    folder = make_checkpoint(tmp_path / "cc", weights=weights)
    result = run("convert", folder, "--out", tmp_path / "model.gguf")
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"will write {tmp_path / 'model.gguf'}: ")
    assert "non-finite" in lines[1]
    assert not (tmp_path / "model.gguf").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_full_disk_is_said_before_anything_is_written(small_disk: Path, checkpoint: Path) -> None:
    (small_disk / "model.gguf").write_bytes(b"good")
    result = run("convert", checkpoint, "--out", small_disk / "model.gguf")
    assert result.returncode == 2
    assert "the disk has" in result.stderr
    assert [path.name for path in small_disk.iterdir()] == ["model.gguf"]
    assert (small_disk / "model.gguf").read_bytes() == b"good"


def test_disk_that_fills_up_meanwhile(small_disk: Path, checkpoint: Path) -> None:
    """The check before the start cannot see what others write; a failing write has to end as cleanly."""
    code = (
        "import pocketquant.gguf_file.writing as p, pocketquant.cli, sys\n"
        "p._check_space = lambda plan, target: None\n"
        f"sys.argv = ['pocketquant', 'convert', {str(checkpoint)!r}, '--out', {str(small_disk / 'm.gguf')!r}]\n"
        "pocketquant.cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "No space left on device" in result.stderr
    assert list(small_disk.iterdir()) == []


def test_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    config = text_config(num_hidden_layers=16, layer_types=None, intermediate_size=16384, hidden_size=2048)
    folder = make_sparse_checkpoint(tmp_path / "big", config, prefix="model.")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.gguf").write_bytes(b"good")
    process = subprocess.Popen([*COMMAND, "quantize", folder, "--out", out / "model.gguf"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(os.listdir(out)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(os.listdir(out)) == 2, "it never started writing"
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in talk
    assert [path.name for path in out.iterdir()] == ["model.gguf"]
    assert (out / "model.gguf").read_bytes() == b"good"


def worker_of(process: subprocess.Popen[bytes]) -> int:
    """The process that does a command's work."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_what_a_killed_run_left_goes_and_a_living_ones_stays(tmp_path: Path, checkpoint: Path) -> None:
    config = text_config(num_hidden_layers=8, layer_types=None, intermediate_size=16384, hidden_size=2048)
    folder = make_sparse_checkpoint(tmp_path / "big", config, prefix="model.")
    out = tmp_path / "out"
    out.mkdir()
    processes, names = [], list[str]()
    for n in range(2):  # one after the other, so that each one's file is known
        processes.append(
            subprocess.Popen([*COMMAND, "convert", folder, "-o", out / "model.gguf", "--threads", "1", "-q"])
        )
        deadline = time.monotonic() + 60
        while len(os.listdir(out)) < n + 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(worker_of(processes[n]), signal.SIGSTOP)
        names += set(os.listdir(out)) - set(names)
    killed, living = processes
    worker = worker_of(killed)
    killed.kill()  # first, so that nobody tidies up
    killed.wait()
    os.kill(worker, signal.SIGKILL)
    assert sorted(os.listdir(out)) == sorted(names)
    time.sleep(0.5)
    assert run("convert", checkpoint, "--out", out / "model.gguf").returncode == 0
    assert sorted(os.listdir(out)) == sorted([names[1], "model.gguf"])
    living.send_signal(signal.SIGINT)
    os.kill(worker_of(living), signal.SIGCONT)
    assert living.wait(timeout=60) == 130
    assert os.listdir(out) == ["model.gguf"]


def test_make_clears_up_after_a_killed_run(tmp_path: Path) -> None:
    out, few = tmp_path / "out", ["--recipe", "q8_0", "--imatrix", "none"]
    process = subprocess.Popen([*COMMAND, "make", checkpoint_dir(), "--out", out, "--quiet", *few])
    deadline = time.monotonic() + 60
    while not list(out.glob(".making/.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(list(out.glob(".making*"))) == 4, "what is finished, the reference, and their locks"
    (tmp_path / "short.txt").write_text("too short")
    result = run("make", checkpoint_dir(), "--out", out, "--text", tmp_path / "short.txt", *few)
    assert result.returncode == 2
    assert "short.txt" in result.stderr
    assert os.listdir(out) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_make_moves_its_files_waits(number: signal.Signals, tmp_path: Path) -> None:
    """The signal comes when the first file is in place: all others follow, and the message tells what is there."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "SHA256SUMS").write_text("old")
    options = ["--recipe", "q8_0", "--imatrix", "none", "--context", "64", "--chunks", "2"]
    code = (
        "import os, sys, pocketquant.cli\n"
        "rename = os.replace\n"
        "def replace(source, target):\n"
        "    rename(source, target)\n"
        f"    if os.path.dirname(target) == {str(out)!r}: os.kill(os.getpid(), {int(number)})\n"
        "os.replace = replace\n"
        f"sys.argv = ['pocketquant', 'make', {str(checkpoint_dir())!r}, '--out', {str(out)!r}, *{options!r}]\n"
        "pocketquant.cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 130
    names = sorted(os.listdir(out))
    assert len(names) == 5
    assert {"report.json", "report.md", "report.html", "SHA256SUMS"} < set(names)
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in sums} == sums
    assert sorted(sums) == [name for name in names if name != "SHA256SUMS"]
    assert "nothing was replaced" not in result.stderr
    said = result.stderr.split("interrupted after these were finished:\n")[1]
    assert sorted(Path(line.strip()).name for line in said.splitlines()) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert"], "Missing argument"),
        (["quantize", "{checkpoint}"], "--out"),
        (["convert", "{checkpoint}", "--out", "x.gguf", "--type", "q8_0"], "bf16, f16 or f32"),
        (["quantize", "{checkpoint}", "--out", "x.gguf", "--recipe", "q9"], "q9: neither a recipe nor a file"),
        (["quantize", "{checkpoint}", "--out", "x.gguf", "--imatrix", "none.gguf"], "none.gguf"),
        (["inspect", "/dev/null"], "it is a device"),
        (["eval", "none.gguf", "--reference", "none.gguf", "--text", "none.txt"], "none.txt"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, checkpoint: Path, tmp_path: Path) -> None:
    result = run(*(argument.format(checkpoint=checkpoint) for argument in arguments), cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []
