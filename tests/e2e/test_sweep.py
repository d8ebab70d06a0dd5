"""`pocketquant sweep`: several files against one reference, taken up again where it was; the best ones stay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pocketquant import compare
from pocketquant.demo import checkpoint_dir, text_path
from pocketquant.files.reading import sha256_of

COMMAND = str(Path(sys.executable).with_name("pocketquant"))
SMALL = ["--context", "64", "--chunks", "4", "--imatrix", "none"]


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_a_sweep_goes_on_and_keeps_the_front(tmp_path: Path) -> None:
    out, sweep = tmp_path / "out", ["sweep", checkpoint_dir(), "-o", tmp_path / "out", *SMALL]
    planned = json.loads(run(*sweep, "-r", "q4_0", "-r", "pocket_4bit", "--dry-run", "--json").stdout)
    assert [entry["is_measured"] for entry in planned["files"]] == [False, False]
    assert not out.exists()
    run(*sweep, "-r", "q4_0", "-r", "pocket_4bit")
    first = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / ".sweep").glob("*.json")}
    assert len(first) == 2
    # files that are gone are made again only if they still should be there; only what is new is measured
    size = min(entry["file_bytes"] for entry in report(out)["variants"])
    for path in out.glob("*.gguf"):
        path.unlink()
    run(*sweep, "-r", "q4_0", "-r", "pocket_4bit", "-r", "q4_k_s", "--target-size", size + 2000)
    kept = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / ".sweep").glob("*.json")}
    assert len(kept) == 4
    assert {name: kept[name] for name in first} == first
    variants = report(out)["variants"]
    assert len(variants) == 4
    for entry in variants:
        is_beaten = any(
            other["file_bytes"] <= entry["file_bytes"] and kld(other) < kld(entry)
            for other in variants
            if other != entry
        )
        assert entry["is_kept"] == (not is_beaten), entry["file"]
        assert (out / entry["file"]).exists() == entry["is_kept"]
        if entry["is_kept"]:
            assert sha256_of(out / entry["file"]) == entry["evaluation"]["provenance"]["model"]["sha256"]
    assert any(not entry["is_kept"] for entry in variants)
    assert not list((out / ".sweep").glob("*.gguf"))
    assert not list((out / ".sweep").glob("*.pqref"))
    assert "joins the files that no other one beats" in (out / "report.html").read_text()
    # the pages of two sweeps over the same are the same
    before = (out / "report.html").read_bytes()
    run(*sweep, "-r", "q4_0", "-r", "pocket_4bit", "-r", "q4_k_s", "--target-size", size + 2000)
    assert (out / "report.html").read_bytes() == before


def kld(entry: dict[str, Any]) -> float:
    value: float = entry["evaluation"]["metrics"]["kld"]["mean"]
    return value


def test_the_numbers_are_those_of_a_comparison(demo_gguf: Any, tmp_path: Path) -> None:
    run("sweep", checkpoint_dir(), "-o", tmp_path, *SMALL, "-r", "q4_0", "--keep", "none", "--positions")
    [entry] = report(tmp_path)["variants"]
    side_by_side = compare(
        demo_gguf("q4_0"), demo_gguf("f32"), text_path("evaluation"), context=64, chunks=4, positions=True
    )
    assert kld(entry) == pytest.approx(side_by_side.metrics.kld.mean, rel=1e-3)
    assert entry["evaluation"]["by_position"] is not None
    assert entry["is_kept"] is False
    assert not list(tmp_path.glob("*.gguf"))
    # the three pages of a report are of one run: where one cannot be replaced, none is
    before = (tmp_path / "report.json").read_bytes()
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    again = run("sweep", checkpoint_dir(), "-o", tmp_path, *SMALL, "-r", "q5_k_s", "--keep", "none", code=2)
    assert "report.html" in again.stderr
    assert (tmp_path / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "name what to compare"),
        (["-r", "q4_0", "--keep", "some"], "front or all or none"),
        (["-r", "q4_0", "-r", "q4_0"], "several files would be called"),
        (["-r", "q9_9"], "neither a recipe nor a file"),
        (["-r", "q4_0", "--imatrix", "none", "--calibrate", "self"], "not both"),
        (["-r", "q4_0", "--text", "/no/such/text"], "cannot be read"),
    ],
)
def test_refusals(options: list[str], said: str, tmp_path: Path) -> None:
    result = run("sweep", checkpoint_dir(), "-o", tmp_path / "out", *options, code=2)
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
