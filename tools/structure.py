"""Prints how a checkout is built, so that two of them can be compared: `python tools/structure.py [ROOT]`.

Files and lines of each folder, imports between folders, long functions, functions with many parameters. Parameters are
counted without `self`; compiled kernels (numba's `jit`) are left out, since they can take nothing but plain values.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "pocketquant"
MOST_LINES, MOST_PARAMETERS = 60, 7


def folder_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package).parts
    return parts[0] if len(parts) > 1 else "."


def imported_folders(tree: ast.Module, package: Path) -> set[str]:
    """Folders of the package that a module imports from; "." for the modules beside them."""
    found = set()
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE and len(parts) > 1:
                found.add(parts[1] if (package / parts[1]).is_dir() else ".")
    return found


def functions(tree: ast.Module) -> Iterator[tuple[str, int, int, bool]]:
    """Name, lines, parameters and whether it is a compiled kernel, of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            n_parameters = sum(argument.arg not in ("self", "cls") for argument in given)
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1, n_parameters, is_kernel


def main() -> None:
    package = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve() / PACKAGE
    n_files, n_lines, edges = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
    long, many = [], []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree, folder, name = ast.parse(text), folder_of(path, package), path.relative_to(package)
        n_files[folder] += 1
        n_lines[folder] += text.count("\n")
        edges.update((folder, other) for other in imported_folders(tree, package) if other != folder)
        for function, lines, parameters, is_kernel in functions(tree):
            if lines > MOST_LINES:
                long.append(f"{lines:4} {name}: {function}")
            if parameters > MOST_PARAMETERS and not is_kernel:
                many.append(f"{parameters:4} {name}: {function}")
    print("files  lines  folder")
    for folder in sorted(n_files):
        print(f"{n_files[folder]:5}  {n_lines[folder]:5}  {folder}")
    print(f"{sum(n_files.values()):5}  {sum(n_lines.values()):5}  in all")
    print(f"\n{sum(edges.values())} imports of {len(edges)} kinds between folders (modules that import x from y)")
    print(f"\n{len(long)} functions of more than {MOST_LINES} lines")
    print("\n".join(sorted(long, reverse=True)))
    print(f"\n{len(many)} functions with more than {MOST_PARAMETERS} parameters, compiled kernels not counted")
    print("\n".join(sorted(many, reverse=True)))


if __name__ == "__main__":
    main()
