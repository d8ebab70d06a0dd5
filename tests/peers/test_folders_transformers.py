"""What is kept of transformers' answers about folders is what it answers today."""

from __future__ import annotations

from pathlib import Path

from folder_oracle import ask_transformers, kept


def test_transformers_answers_as_kept(oracle_python: Path, tmp_path: Path) -> None:
    answers, expected = ask_transformers(oracle_python, tmp_path), kept()
    for what in ("tokens", "heads"):
        for case, answer in expected[what].items():
            assert answers[what][case] == answer, (case, answers["transformers"])
        assert answers[what].keys() == expected[what].keys()
