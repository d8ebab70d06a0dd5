"""Folders as people have them, converted and loaded by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import llama_cpp
import pytest
from checkpoint_maker import make_checkpoint
from folder_oracle import kept
from token_cases import CONFIG, MAP, TAKEN, write_case

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.llama.runtime import open_runtime


@pytest.mark.parametrize("case", ["extra list", "map: of the model's own", "added_tokens.json", "all at once"])
def test_a_token_named_beside_the_tokenizer_is_one_id_in_llama_cpp(case: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    write_case(folder, TAKEN[case])
    write(plan(open_model(folder), open_recipe("q8_0")), tmp_path / "out.gguf")
    with open_runtime(tmp_path / "out.gguf", context=64) as runtime:
        assert runtime.tokenize("a <|tool_boundary|> b", special=True) == kept()["tokens"][case]["ids"][0]


def test_a_token_named_like_padding_loads(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    write_case(folder, TAKEN["named like padding, without an id"])
    write(plan(open_model(folder), open_recipe("q8_0")), tmp_path / "out.gguf")
    with open_runtime(tmp_path / "out.gguf", context=64) as runtime:
        assert runtime.tokenize("[PAD300]", special=True) == [262]


def test_an_end_token_that_only_an_older_file_names_ends_generation(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", eos_token_id=None)
    write_case(folder, {CONFIG: {"eos_token": None}, MAP: {"eos_token": "</think>"}})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    (folder / "generation_config.json").unlink()
    write(plan(open_model(folder), open_recipe("q8_0")), tmp_path / "out.gguf")
    with open_runtime(tmp_path / "out.gguf", context=64) as runtime:
        assert llama_cpp.llama_vocab_eos(runtime._vocab) == 261
        assert llama_cpp.llama_vocab_is_eog(runtime._vocab, 261)
