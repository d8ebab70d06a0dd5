"""A copy of the package with what a page of the docs adds to it.

The first line of a fence names its file: a `python` fence is a new file, a `diff` fence changes one (lines with
+ are added, lines with - go, all others must be there), and any other named fence is written as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pocketquant

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r"^```(\w+) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class EditedPackage:
    """A folder with a `pocketquant` of its own, and the other files of the page."""

    folder: Path

    def run(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs python with this package; fails if it ends with another exit code."""
        path = os.pathsep.join([str(self.folder), str(ROOT / "tests")])
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done


def apply_page(page: Path, folder: Path) -> EditedPackage:
    """Copies the package into the folder and does to it what the page says."""
    source = Path(pocketquant.__file__).parent
    shutil.copytree(source, folder / "pocketquant", ignore=shutil.ignore_patterns("__pycache__"))
    fences = _FENCE.findall(page.read_text())
    assert fences, f"{page}: no fence names a file"
    for kind, name, text in fences:
        path = folder / name
        if kind != "diff":
            assert not path.exists(), f"{page}: {name} is there already"
            path.write_text(text)
            continue
        lines = text.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        before = path.read_text()
        assert before.count(old) == 1, f"{page}: {name} has no longer the lines\n{old}"
        path.write_text(before.replace(old, new))
    return EditedPackage(folder)
