"""Fixtures shared by the tests: small checkpoints, the embedded model's files, and the oracles' interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent

# A shell starts what it puts in the background with Ctrl-C ignored, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Test processes share the processors. Threads of llama.cpp and of numpy's products that wait for one another in a loop
# would take the time of those they wait for, several times the work itself: llama.cpp's sleep, and products have one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint: one file, BF16, two value heads per key head, tied. Not to be written to."""
    from checkpoint_maker import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "Tiny-1M")


@pytest.fixture(scope="session")
def realistic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with norms as training leaves them. Not to be written to."""
    from check_maker import make_trained_checkpoint

    return make_trained_checkpoint(tmp_path_factory.mktemp("check") / "c")


@pytest.fixture(scope="session")
def good(realistic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a GGUF with nothing to find. Not to be written to."""
    from check_maker import make_good_gguf

    return make_good_gguf(realistic, tmp_path_factory.mktemp("check") / "good.gguf")


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`demo_gguf(recipe)`: the embedded model in that recipe, made once for all test processes."""
    from pocketquant import open_model, open_recipe, plan, write
    from pocketquant.demo import checkpoint_dir

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if folder.name.startswith("popen-") else folder

    def make(recipe: str) -> Path:
        path = folder / f"demo-{recipe}.gguf"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                write(plan(open_model(checkpoint_dir()), open_recipe(recipe)), path)
        return path

    return make


@pytest.fixture(scope="session")
def demo_text() -> Path:
    """The embedded evaluation text, which the embedded model was not trained on."""
    from pocketquant.demo import text_path

    return text_path("evaluation")


@pytest.fixture(scope="session")
def oracle_python() -> Path:
    """An interpreter with torch, transformers and llama.cpp's converter; `make peers` sets it up."""
    python = ROOT / ".venv-peers/bin/python"
    probe = "import sys, torch, transformers; open(sys.prefix + '/llama.cpp/RELEASE')"
    if not python.exists() or subprocess.run([python, "-c", probe], capture_output=True).returncode:
        pytest.skip("no .venv-peers with torch, transformers and llama.cpp's converter; `make peers` makes it")
    return python
