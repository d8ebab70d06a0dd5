"""Damaged installations and limits that are too low: what is broken is named with its remedy, and nothing is a fault of
ours; an interrupt is none of these."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketquant.demo import checkpoint_dir
from pocketquant.doctor import NEEDED
from pocketquant.failures import broken_package, describe, distribution_of

resource = pytest.importorskip("resource", reason="limits are POSIX's")

COMMAND = [sys.executable, "-m", "pocketquant"]
Break = Callable[[str, str], dict[str, str]]


@pytest.fixture
def broken(tmp_path: Path) -> Break:
    """`broken(module, code)`: an environment where importing a module runs that code instead."""

    def make(module: str, code: str) -> dict[str, str]:
        (tmp_path / "first" / module).mkdir(parents=True)
        (tmp_path / "first" / module / "__init__.py").write_text(code)
        places = [str(tmp_path / "first"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {"PYTHONPATH": os.pathsep.join(places)}

    return make


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)  # type: ignore


def test_doctor_looks_at_every_package_that_is_needed() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    lines = re.findall(r'"([^"]+)"', text.split("\ndependencies = [")[1].split("\n]")[0])
    stated = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in lines if ";" not in line}
    plain = {name.lower().replace("_", "-") for name in map(distribution_of, NEEDED)}
    assert plain == {name.lower().replace("_", "-") for name in stated}


@pytest.mark.parametrize(
    ("module", "code", "package", "said"),
    [
        ("jinja2", "import os; os.nothing", "jinja2", "has no attribute 'nothing'"),
        ("yaml", "def (", "pyyaml", "invalid syntax"),
        ("tokenizers", "raise ImportError('tokenizers.abi3.so: file too short')", "tokenizers", "file too short"),
        ("gguf", "import a_part_of_it", "a-part-of-it", "No module named 'a_part_of_it'"),
        ("numpy", "1 / 0", "numpy", "division by zero"),
    ],
)
def test_doctor_names_a_damaged_package(module: str, code: str, package: str, said: str, broken: Break) -> None:
    done = run("doctor", "--json", env=broken(module, code))
    assert (done.returncode, done.stderr) == (1, "")
    parts = {part["name"].lower(): part for part in json.loads(done.stdout)["parts"]}
    part = parts[f"package {distribution_of(module).lower()}"]
    assert part["status"] == "fail"
    assert said in part["found"]
    assert part["remedy"].lower() == f"pip install --force-reinstall {package}"


def test_a_command_names_a_damaged_package(broken: Break, tmp_path: Path) -> None:
    environment = broken("gguf", "import os; os.nothing")
    done = run("quantize", checkpoint_dir(), "-r", "q8_0", "-o", tmp_path / "m.gguf", "--json", env=environment)
    assert done.returncode == 2
    assert "the package gguf is missing or damaged" in done.stderr
    assert "pip install --force-reinstall gguf" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_command_lines_own_packages_there_is_a_document_too(module: str, broken: Break) -> None:
    done = run("doctor", "--json", env=broken(module, "import os; os.nothing"))
    assert done.returncode == 2
    assert f"pip install --force-reinstall {module}" in done.stderr
    assert f"the package {module} is missing or damaged" in json.loads(done.stdout)["error"]["message"]


def test_what_is_no_import_is_no_damage() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        json.loads("[]", parse_int=lambda _: 0) or 1 / 0
    assert broken_package(caught.value) is None
    assert describe(caught.value)[1] == 70


@pytest.mark.parametrize("mib", [40, 80, 120, 160, 250, 490])
def test_too_little_memory_to_start_in_is_said(mib: int, tmp_path: Path) -> None:
    """numpy, OpenBLAS and numba fail in ways of their own, each at another limit."""
    done = run(
        *("quantize", checkpoint_dir(), "-r", "q4_k_m", "-o", tmp_path / "m.gguf"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20)),
    )
    assert done.returncode == 2, done.stderr
    assert f"no more than {mib} MiB of address space" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("n", [5, 6, 8])
def test_too_few_open_files_are_said(n: int, tmp_path: Path) -> None:
    done = run(
        *("quantize", checkpoint_dir(), "-r", "q4_k_m", "-o", tmp_path / "m.gguf"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (n, n)),
    )
    assert done.returncode == 2, done.stderr
    assert "raise" in done.stderr
    assert "ulimit -n" in done.stderr
    assert "Traceback" not in done.stderr


INTERRUPTED_IMPORT = """
import os, signal, sys, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
            try:
                time.sleep({seconds})
            except BaseException:
                raise ImportError("libllvm.so: undefined symbol")
sys.meta_path.insert(0, Finder())
sys.argv = ["pocketquant", "quantize", {source!r}, "-r", "q8_0", "-o", {out!r}]
from pocketquant.cli import main
main()
"""


@pytest.mark.parametrize("seconds", [0.2, 6.0])  # an import that ends soon, and one that must be cut
def test_an_interrupt_inside_an_import_is_an_interrupt(seconds: float, tmp_path: Path) -> None:
    program = INTERRUPTED_IMPORT.format(
        name="numba.core.types", seconds=seconds, source=str(checkpoint_dir()), out=str(tmp_path / "m.gguf")
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[0]) == (130, "error: interrupted; nothing was replaced")
    assert "damaged" not in done.stderr
    assert os.listdir(tmp_path) == []
