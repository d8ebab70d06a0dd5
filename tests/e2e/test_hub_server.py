"""Checkpoints from a hub, through the command line and the unmodified huggingface_hub client, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, text_config, weights_for
from hub_server import COMMIT, TOKEN, Fault, Hub, serving

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.convert.safetensors import read_safetensors_header

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with a vision tower and MTP weights that no plan needs."""
    weights = weights_for(text_config())
    weights["model.visual.blocks.0.norm1.weight"] = np.ones(4000, np.float32)
    weights["mtp.fc.weight"] = np.ones((40, 80), np.float32)
    folder = make_checkpoint(tmp_path_factory.mktemp("hub") / "Tiny-1M", n_shards=3, weights=weights)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Tiny\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickle" * 1000)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> bytes:
    """What the local folder gives."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "local.gguf"
        write(plan(open_model(folder), open_recipe("q4_0")), path)
        return path.read_bytes()


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with serving({"org/Tiny-1M": folder}) as hub:
        yield hub


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    def run_command(
        *arguments: object, code: str = "from pocketquant.cli import main; main()", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))}
        hubs = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "MODELSCOPE_DOMAIN": hub.url}
        quick = "from pocketquant.convert import http_ranges; http_ranges.FIRST_WAIT_SECONDS = 0.01; "
        command = [sys.executable, "-c", quick + code, *map(str, arguments)]
        return subprocess.run(
            command, env={**inherited, **hubs, **environment}, capture_output=True, text=True, timeout=300
        )

    return run_command


def quantize(run: Run, source: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    only_text = ["--mmproj", "none", "--mtp", "drop"]  # what stands for the other parts here is no whole tower or block
    return run("quantize", source, "--recipe", "q4_0", "--quiet", *only_text, "--out", out, **environment)


@pytest.mark.parametrize("source", ["org/Tiny-1M", "hf://org/Tiny-1M@v1", f"org/Tiny-1M@{COMMIT}", "ms://org/Tiny-1M"])
def test_a_quantization_from_a_hub_is_the_one_from_the_folder(
    source: str, run: Run, hub: Hub, folder: Path, expected: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    result = quantize(run, source, out, HF_TOKEN=TOKEN, MODELSCOPE_API_TOKEN=TOKEN)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert out.read_bytes() == expected
    left_out = {"model-00001": 0, "model-00002": 0, "model-00003": 0}
    for path in folder.glob("*.safetensors"):
        for tensor in read_safetensors_header(path):
            if "visual" in tensor.name or "mtp" in tensor.name:
                left_out[path.name[:11]] += tensor.nbytes
    assert sum(left_out.values()) == 2 * (4000 + 3200)
    for name, nbytes in hub.served.items():
        assert nbytes == (folder / name).stat().st_size - left_out.get(name[:11], 0), name
    assert "pytorch_model.bin" not in hub.served


def test_nothing_is_sent_but_reading_requests_and_no_token_leaves_the_hub(run: Run, hub: Hub, tmp_path: Path) -> None:
    assert quantize(run, "org/Tiny-1M", tmp_path / "out.gguf", HF_TOKEN=TOKEN).returncode == 0
    for line, headers in hub.requests:
        assert line.split(" ")[0] in ("GET", "HEAD")
        assert line.split(" ")[1].startswith(("/api/models/org/Tiny-1M", "/org/Tiny-1M/resolve/", "/storage/")), line
        assert int(headers.get("Content-Length", headers.get("content-length", 0))) == 0
        assert (TOKEN in str(headers)) == ("/storage/" not in line)


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_what_a_repository_holds_besides_is_named(scheme: str, run: Run) -> None:
    shown = run("inspect", f"{scheme}://org/Tiny-1M")
    assert "passed over (pickled, which is never read): pytorch_model.bin" in shown.stdout, shown.stderr


def test_a_second_run_reads_the_small_files_from_the_cache(run: Run, hub: Hub, tmp_path: Path) -> None:
    assert run("inspect", "org/Tiny-1M").returncode == 0
    hub.reset()
    assert run("inspect", "org/Tiny-1M").returncode == 0
    assert not any(name.endswith((".json", ".md")) for name in hub.served)


def test_keep_source_downloads_checks_and_converts_from_there(
    hub: Hub, folder: Path, expected: bytes, tmp_path: Path, run: Run
) -> None:
    for scheme in ("hf", "ms"):
        kept = tmp_path / scheme
        code = (
            "from pocketquant import *; import sys; "
            f"m = open_model('{scheme}://org/Tiny-1M', keep_source=sys.argv[1]); "
            "write(plan(m, open_recipe('q4_0')), sys.argv[2])"
        )
        result = run(kept, tmp_path / f"{scheme}.gguf", code=code)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / f"{scheme}.gguf").read_bytes() == expected
        for path in folder.glob("*.safetensors"):
            assert (kept / "Tiny-1M" / path.name).read_bytes() == path.read_bytes()
        hub.reset()
        assert run(kept, tmp_path / f"{scheme}.gguf", code=code).returncode == 0
        assert not any(name.endswith(".safetensors") for name in hub.served)
    hub.listed_digest["model-00002-of-00003.safetensors"] = "0" * 64
    for scheme in ("hf", "ms"):
        code = f"from pocketquant import *; import sys; open_model('{scheme}://org/Tiny-1M', keep_source=sys.argv[1])"
        result = run(tmp_path / f"{scheme}-2", code=code)
        assert "model-00002-of-00003.safetensors: expected 0000" in result.stderr, result.stderr


# ---------------------------------------------------------------- faults


def test_faults_on_the_way_change_no_byte(run: Run, hub: Hub, expected: bytes, tmp_path: Path) -> None:
    hub.faults = [
        Fault("GET /api/models/", status=503),
        Fault("GET /api/models/", status=429, headers={"Retry-After": "1"}),
        Fault("GET /org/Tiny-1M/resolve/", status=500, after=1),
        Fault("/storage/org/Tiny-1M/model-00001", cut=5000, after=4),
        Fault("/storage/org/Tiny-1M/model-00002", status=502, after=3, times=2),
        Fault("/storage/org/Tiny-1M/model-00003", status=403, after=5),
        Fault("/storage/org/Tiny-1M/model-00003", cut=1, after=6),
    ]
    result = quantize(run, "org/Tiny-1M", tmp_path / "out.gguf")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.gguf").read_bytes() == expected
    assert all(fault.times == 0 for fault in hub.faults)


def test_a_shard_that_changes_while_it_is_read_is_refused(run: Run, hub: Hub, tmp_path: Path) -> None:
    reads = 0

    def edit(name: str, data: bytes) -> bytes:
        nonlocal reads
        if name == "model-00002-of-00003.safetensors":
            reads += 1
            if reads > 6:
                return data[:-2] + b"xx"
        return data

    hub.edit = edit
    result = quantize(run, "org/Tiny-1M", tmp_path / "out.gguf")
    assert result.returncode == 2
    assert "model-00002-of-00003.safetensors: changed while it was being read" in result.stderr
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/none", "hf://org/none: not found on Hugging Face (404); check the name"),
        ("ms://org/none", "ms://org/none: not found on ModelScope (404); check the name"),
        ("org/Tiny-1M@none", "hf://org/Tiny-1M@none: no such revision; give a branch, a tag or a commit"),
        ("ms://org/Tiny-1M@none", "ms://org/Tiny-1M@none: not found on ModelScope (404)"),
    ],
)
def test_missing_repositories_and_revisions(source: str, message: str, run: Run) -> None:
    result = run("inspect", source)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())


def test_a_gated_repository_wants_a_token(run: Run, hub: Hub) -> None:
    hub.gated.add("org/Tiny-1M")
    for environment, status in (({}, 401), ({"HF_TOKEN": "hf_wrongwrongwrong"}, 403)):
        result = run("inspect", "org/Tiny-1M", **environment)
        assert result.returncode == 2
        assert f"hf://org/Tiny-1M: gated ({status}); ask for access" in " ".join(result.stderr.split())
        assert "hf_wrong" not in result.stderr + result.stdout
    assert run("inspect", "org/Tiny-1M", HF_TOKEN=TOKEN).returncode == 0


def test_a_missing_shard_is_named(run: Run, hub: Hub, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "partial"
    other.mkdir()
    for path in folder.iterdir():
        if "00002" not in path.name:
            (other / path.name).symlink_to(path)
    hub.folders["org/partial"] = other
    result = run("inspect", "org/partial")
    assert result.returncode == 2
    assert "hf://org/partial: shards named in the index are missing" in result.stderr
    assert "model-00002-of-00003.safetensors" in result.stderr


def test_too_many_requests_that_do_not_end_are_given_up_with_advice(run: Run, hub: Hub) -> None:
    hub.faults = [Fault("/api/models/", status=429, headers={"Retry-After": "3600"}, times=99)]
    result = run("inspect", "org/Tiny-1M")
    assert result.returncode == 2
    assert "asks to wait 3600 seconds" in " ".join(result.stderr.split())


def test_no_hub_at_all_is_said(run: Run) -> None:
    result = run("inspect", "org/Tiny-1M", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 2
    assert "hf://org/Tiny-1M: gave up after 6 tries: the hub does not answer" in " ".join(result.stderr.split())
    result = run("inspect", "ms://org/Tiny-1M", MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    assert "ms://org/Tiny-1M: gave up at byte 0 after 6 tries: no answer from 127.0.0.1" in " ".join(
        result.stderr.split()
    )


# ---------------------------------------------------------------- offline


def test_offline_uses_what_the_cache_holds(run: Run, hub: Hub, expected: bytes, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    nothing = run("inspect", "org/Tiny-1M", **offline)
    assert nothing.returncode == 2
    assert "not in the local cache, and HF_HUB_OFFLINE is set" in " ".join(nothing.stderr.split())
    assert run("inspect", "org/Tiny-1M").returncode == 0
    small = run("inspect", "org/Tiny-1M", **offline)
    assert small.returncode == 2
    assert "holds its config but not its weights" in " ".join(small.stderr.split())
    code = (
        "from huggingface_hub import hf_hub_download; "
        "[hf_hub_download('org/Tiny-1M', f'model-0000{i}-of-00003.safetensors') for i in (1, 2, 3)]"
    )
    assert run(code=code).returncode == 0
    hub.reset()
    assert quantize(run, "org/Tiny-1M", tmp_path / "offline.gguf", **offline).returncode == 0
    assert hub.requests == []
    assert quantize(run, "org/Tiny-1M", tmp_path / "online.gguf").returncode == 0
    assert not any(name.endswith(".safetensors") for name in hub.served)
    assert (tmp_path / "offline.gguf").read_bytes() == (tmp_path / "online.gguf").read_bytes() == expected
