"""Files around the package that name each other's contents: versions, steps of `make`, what an image is built from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

import pocketquant

try:
    import tomllib
except ImportError:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_one_version() -> None:
    assert PROJECT["project"]["version"] == pocketquant.__version__ == read_yaml("CITATION.cff")["version"]
    newest = re.search(r"^## (\S+), ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == pocketquant.__version__


def test_one_licence() -> None:
    assert PROJECT["project"]["license"] == read_yaml("CITATION.cff")["license"]


def test_the_workflow_runs_what_make_knows() -> None:
    [job] = read_yaml(".github/workflows/tests.yml")["jobs"].values()
    steps = [step["run"] for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"make check", "make test", "make demo", "make build"} <= set(steps)
    assert {step.split()[1] for step in steps} <= set(targets)


def test_the_workflow_tests_the_ends_of_the_range_of_pythons() -> None:
    [job] = read_yaml(".github/workflows/tests.yml")["jobs"].values()
    low, high = re.findall(r"\d+\.(\d+)", PROJECT["project"]["requires-python"])
    assert job["strategy"]["matrix"]["python"] == [f"3.{low}", f"3.{int(high) - 1}"]


def test_a_report_of_a_fault_asks_for_the_machine() -> None:
    form = read_yaml(".github/ISSUE_TEMPLATE/bug.yml")["body"]
    [asked] = [part for part in form if "pocketquant doctor --json" in part["attributes"].get("label", "")]
    assert asked["validations"]["required"]


def test_the_image_is_built_from_files_that_are_there_and_sent() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert sent == set(copied)
    assert all((ROOT / name).exists() for name in copied)
    licences = PROJECT["project"]["license-files"]  # a build without them fails
    assert all(name.split("/")[0] in sent for name in [PROJECT["project"]["readme"]["file"], *licences])


def test_the_source_distribution_has_what_its_tests_read() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for name in ("CITATION.cff", "Dockerfile", ".dockerignore", ".github", "CHANGELOG.md", "Makefile", "tests"):
        assert f"/{name}" in included


def anchors_of(page: Path) -> set[str]:
    """The names that a page's headings get: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    lost = []
    for page in pages:
        for target in links_of(page):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            if ":" in path:
                continue
            if not found.exists() or (anchor and anchor not in anchors_of(found)):
                lost.append(f"{page.relative_to(ROOT)}: {target}")
    assert len(pages) > 20
    assert not lost


def test_the_first_page_of_the_documentation_leads_to_every_page() -> None:
    first = ROOT / "docs/README.md"
    linked = {(first.parent / target.partition("#")[0]).resolve() for target in links_of(first)}
    pages = {page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "decisions"} - {first}
    assert pages <= linked, sorted(str(page.relative_to(ROOT)) for page in pages - linked)


def test_files_that_pages_name_exist() -> None:
    """But for decisions and experiments, which tell what was."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/guide").glob("*.md")]
    pages += (ROOT / "docs/explain").glob("*.md")
    lost = []
    for page in sorted({*pages} - {ROOT / "docs/experiments.md", ROOT / "CHANGELOG.md"}):
        named = re.findall(
            r"`((?:pocketquant|tests|tools|benchmarks|docs)/[\w/.-]+)`", page.read_text(encoding="utf-8")
        )
        lost += [f"{page.relative_to(ROOT)}: {name}" for name in named if not (ROOT / name).exists()]
    assert not lost
