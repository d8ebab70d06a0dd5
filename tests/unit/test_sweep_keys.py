"""What a sweep's measurements depend on: another file of statistics is another measurement."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from statistics_maker import make_statistics

from pocketquant import open_model
from pocketquant.calibration.statistics import open_statistics
from pocketquant.quant import Choice, open_recipe
from pocketquant.release.planning import ReleaseSettings, plan_release
from pocketquant.release.sweep import plan_sweep

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def keys_with(checkpoint: Path, stats: Path) -> tuple[str, ...]:
    choice = Choice(open_recipe("q4_0"), statistics=open_statistics(stats))
    release = plan_release(checkpoint, [choice], ReleaseSettings(context=64, chunks=2, calibrate=None))
    return plan_sweep(release).keys


def test_another_file_of_statistics_is_measured_anew(checkpoint: Path, tmp_path: Path) -> None:
    model = open_model(checkpoint)
    first, other = (make_statistics(model, tmp_path / f"{salt}.stats", salt=salt) for salt in ("a", "b"))
    (tmp_path / "copy").mkdir()
    copy = Path(shutil.copy(first, tmp_path / "copy/other-name.stats"))
    assert keys_with(checkpoint, first) == keys_with(checkpoint, copy)
    assert keys_with(checkpoint, first) != keys_with(checkpoint, other)
