"""Flags that tie the head to the embedding: what transformers 5.24 loads, for every pair of them and every head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from adapter_maker import rows_of
from checkpoint_maker import make_checkpoint, text_config, weights_for
from folder_oracle import TIES, kept, write_tie_case

from pocketquant import open_model
from pocketquant.errors import ArchitectureError
from pocketquant.model import Model


@pytest.mark.parametrize("case", TIES)
def test_tie_flags_give_the_head_that_transformers_loads(case: str, tmp_path: Path) -> None:
    top, text, head = TIES[case]
    folder = write_tie_case(tmp_path / "c", top, text, head)
    answers = set(kept()["heads"][case].values())
    if answers == {None} and (top is not None or text is not None):  # a random head, whatever it is loaded as
        with pytest.raises(ArchitectureError, match="lm_head"):
            open_model(folder)
        return
    model = open_model(folder)
    shared = [np.array_equal(rows_of(model, name), rows_of(model, "token_embd.weight")) for name in heads(model)]
    assert all(shared) == (False not in answers)
    is_tied_somewhere = top is True or text is True
    assert model.is_tied == (head == "none" or (head == "same" and is_tied_somewhere))
    differing = head == "none" and {top, text} == {True, False}
    assert any("there is no head, so the embedding is the head" in note for note in model.notes) == differing


def heads(model: Model) -> list[str]:
    return [tensor.name for tensor in model.tensors if tensor.name == "output.weight"]


@pytest.mark.parametrize("flag", [True, None])
def test_a_text_model_has_one_flag(flag: bool | None, tmp_path: Path) -> None:
    weights = weights_for(text_config())
    assert open_model(make_checkpoint(tmp_path / "c", weights=weights, tie_word_embeddings=flag)).is_tied
