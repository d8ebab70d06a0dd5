"""What may import what, and what the package shows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pocketquant

ROOT = Path(pocketquant.__file__).parent
LAYERS = [
    {"escaping"},
    {"errors", "activity", "extras", "failures", "machine", "pace"},
    {"formats"},
    {"files"},
    {"model"},
    {"architectures"},
    {"gguf_file"},
    {"llama", "demo"},
    {"texts"},
    {"cluster", "convert", "calibration", "check", "eval", "fit"},
    {"quant"},
    {"tuning"},
    {"release", "doctor"},
    {"api"},
    {"cli"},
]
"""From the lowest: a part imports from those below it, never from one beside it."""
ONLY_IN = {
    "gguf": {"gguf_file/header", "gguf_file/values", "formats/grids", "convert/description"},
    "yaml": {"convert/description"},
    "llama_cpp": {"llama"},
    "lm_eval": {"eval/tasks/compare", "eval/tasks/loading"},
    "typer": {"cli"},
    "rich": {"cli"},
    "tokenizers": {"convert"},
    "jinja2": {"texts/chat_template", "eval/report/html/page"},
    "huggingface_hub": {"convert"},
    "dask": {"cluster"},
    "distributed": {"cluster"},
    "torch": {"eval/torch_reference", "calibration/torch_layers"},
    "transformers": {"eval/torch_reference", "calibration/torch_layers"},
}
LAZY = {"torch", "transformers"}
"""Too heavy to be imported before somebody asks for them, even where they may be."""


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_layers_import_downwards_only() -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in ROOT.rglob("*.py"):
        inside = path.relative_to(ROOT).with_suffix("").as_posix()
        part = inside.split("/")[0]
        if part in ("__init__", "__main__"):
            continue
        for imported in imports_of(path):
            names = imported.split(".")
            assert {part, inside} & ONLY_IN.get(names[0], {part}), f"{path.name} imports {imported}"
            if names[0] == "pocketquant" and len(names) > 1 and names[1] in level and names[1] != part:
                assert level[names[1]] < level[part], f"{path.relative_to(ROOT)} imports {imported}"


def test_torch_is_imported_inside_functions_only() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not LAZY & {name.split(".")[0] for name in names}, f"{path.name} imports {names}"


def test_every_module_has_a_layer() -> None:
    known = {name for names in LAYERS for name in names} | {"__init__", "__main__", "__pycache__", "py"}
    assert {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.name != "py.typed"} <= known


def test_public_names_exist() -> None:
    assert sorted(pocketquant.__all__) == pocketquant.__all__
    for name in pocketquant.__all__:
        assert getattr(pocketquant, name) is not None


def test_importing_imports_nothing_heavy() -> None:
    heavy = "numpy numba gguf llama_cpp rich typer tokenizers jinja2 huggingface_hub distributed"
    code = f"import sys, pocketquant; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_oracles_environment_has_what_scripts_of_the_peer_tests_import() -> None:
    """They run in an interpreter without the package's dependencies, and CI does not run them."""
    project = Path(__file__).parents[2]
    scripts = [ast.parse(path.read_text()) for path in (project / "tests/peers").glob("*_run.py")]
    ours = [
        n for tree in scripts for n in tree.body if isinstance(n, ast.ImportFrom) and "pocketquant" in str(n.module)
    ]
    shown = "import sys\nprint(*[m.__file__ for name, m in sys.modules.items() if name.startswith('pocketquant')])"
    code = "\n".join([*map(ast.unparse, ours), shown])
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    needed = set()
    for node in (node for path in loaded for node in ast.parse(Path(path).read_text()).body):
        if isinstance(node, ast.Import):
            needed |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            needed.add(node.module.split(".")[0])
    installed = set(re.findall(r"^[\w-]+", (project / "tools/requirements.txt").read_text(), re.MULTILINE))
    assert {"numpy", "numba"} < needed
    assert needed - set(sys.stdlib_module_names) - {"pocketquant"} <= installed
