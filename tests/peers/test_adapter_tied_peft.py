"""Adapters of a tied model: what PEFT saves is what is kept, and merged is what its loaded model computes with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_maker import rows_of
from checkpoint_maker import make_checkpoint
from peft_cases import CASES, GOLDEN, ask_peft

from pocketquant import open_model


@pytest.fixture(scope="module")
def made(oracle_python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder with the base model and an adapter for every case, and what was saved."""
    if subprocess.run([oracle_python, "-c", "import peft"], capture_output=True).returncode:
        pytest.skip("no peft in .venv-peers; pip install peft there")
    folder = tmp_path_factory.mktemp("peft")
    checkpoint = make_checkpoint(folder / "base", dtype="F32")
    return folder, ask_peft(oracle_python, checkpoint, folder / "adapters")


def test_peft_saves_the_names_that_are_kept(made: tuple[Path, dict[str, Any]]) -> None:
    assert made[1]["cases"] == json.loads(GOLDEN.read_text())["cases"]


@pytest.mark.parametrize("case", [case for case, (_, rows) in CASES.items() if not rows])
def test_tied_head_and_embedding_are_what_the_loaded_model_has(case: str, made: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = made
    model = open_model(folder / "base", adapter=folder / "adapters" / case)
    expected = np.load(folder / "adapters" / case / "effective.npz")
    found = {"embedding": rows_of(model, "token_embd.weight")}
    found["head"] = found["embedding"] if model.is_tied else rows_of(model, "output.weight")
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= 2e-6 * np.abs(values).max(), name
    assert model.is_tied == np.array_equal(expected["embedding"], expected["head"])
