"""docs/where-is.md: every row's word leads to its file in two steps, and the name is defined there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import pocketquant

ROOT = Path(pocketquant.__file__).parent
PAGE = Path(__file__).parents[2] / "docs/where-is.md"
ROWS = [
    tuple(cell.strip().strip("`") for cell in line.strip("|\n").split("|"))
    for line in PAGE.read_text().splitlines()
    if re.match(r"\| .*\?", line)
]


@functools.cache
def modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}


def module_of(path: Path) -> str:
    return ".".join(("pocketquant", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imported_by(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def defined_in(tree: ast.Module) -> set[str]:
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}


def test_the_page_has_rows() -> None:
    assert len(ROWS) > 10


@pytest.mark.parametrize(("question", "word", "file", "name"), ROWS)
def test_a_word_leads_to_the_answer_in_two_steps(question: str, word: str, file: str, name: str) -> None:
    answer = ROOT / file
    assert name in defined_in(modules()[answer]), question
    found = []
    for path, tree in modules().items():
        opening = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
        if word.lower() in opening.lower() or word.lower() == path.stem:
            found.append((path, tree))
    hops = [path for path, tree in found if path == answer or module_of(answer) in imported_by(tree)]
    assert hops, f"{question} none of {[str(path.relative_to(ROOT)) for path, _ in found]} is or imports {file}"
    assert word in answer.read_text(), f"{question} {file} itself does not say {word}"
