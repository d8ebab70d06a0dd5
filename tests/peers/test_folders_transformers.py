"""What is kept of transformers' answers about folders is what it answers today."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from folder_oracle import ask, ask_transformers, kept
from weight_cases import CASES, NEW


def test_transformers_answers_as_kept(oracle_python: Path, tmp_path: Path) -> None:
    answers, expected = ask_transformers(oracle_python, tmp_path), kept()
    for what in ("tokens", "heads"):
        for case, answer in expected[what].items():
            assert answers[what][case] == answer, (case, answers["transformers"])
        assert answers[what].keys() == expected[what].keys()


def test_transformers_loads_the_newer_weights(oracle_python: Path, tmp_path: Path) -> None:
    for case, (write_case, _) in CASES.items():
        write_case(tmp_path / case)
    answers = ask(oracle_python, "weights", [tmp_path / case for case in CASES])["cases"]
    for case in CASES:
        assert np.allclose(answers[case], NEW["model.embed_tokens.weight"][0, :8], atol=0.01), case
