"""docs/guide/how-it-works.md: every file that it names is in the package, and every name of its table in that file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import pocketquant

ROOT = Path(pocketquant.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs/guide/how-it-works.md").read_text(encoding="utf-8")
STEPS = [
    (number, file, re.findall(r"`(\w+)`", names))
    for number, file, names in re.findall(r"^\| (\d+) \|.*\| `([\w/.]+)` \| (.+) \|$", PAGE, re.MULTILINE)
]


def defined_in(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_the_steps_are_numbered() -> None:
    assert [int(number) for number, _, _ in STEPS] == list(range(1, len(STEPS) + 1))
    assert len(STEPS) == len(re.findall(r"^\| \d+ \|", PAGE, re.MULTILINE)) > 20


@pytest.mark.parametrize(("number", "file", "names"), STEPS, ids=[number for number, _, _ in STEPS])
def test_a_step_is_where_the_page_says(number: str, file: str, names: list[str]) -> None:
    assert names
    assert set(names) <= defined_in(ROOT / file)


def test_other_files_that_are_named_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)`", PAGE)
    assert len(named) > len(STEPS)
    assert not [file for file in named if not (ROOT / file).exists()]
