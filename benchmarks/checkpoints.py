"""Synthetic checkpoints of the real models' shapes: gaussian BF16 weights, a tokenizer of the real size."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from checkpoint_maker import make_sparse_checkpoint, text_config, tokenizer_json, write_json_files

SHAPES = {
    "0.8B": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "linear_num_value_heads": 16}
    | {"num_attention_heads": 8, "num_key_value_heads": 2},
    "4B": {"hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "linear_num_value_heads": 32}
    | {"num_attention_heads": 16, "num_key_value_heads": 4},
}
N_VOCAB = 248320
_N_TOKENS = 248044  # before the special tokens
_SAME_WEIGHTS = 1 << 19


def make_checkpoint(folder: Path, size: str) -> Path:
    """A checkpoint of the shapes of `size`; gaussian weights, one mebibyte of them over and over."""
    tokenizer = make_tokenizer()
    end = tokenizer["added_tokens"][2]["id"]
    config = text_config(
        **SHAPES[size],
        head_dim=256,
        linear_num_key_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        layer_types=None,
        full_attention_interval=4,
        vocab_size=N_VOCAB,
        eos_token_id=end,
    )
    make_sparse_checkpoint(folder, config, prefix="model.")
    write_json_files(folder, config, tokenizer)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {end}}}')
    path = folder / "model.safetensors"
    values = np.random.default_rng(0).standard_normal(_SAME_WEIGHTS, dtype=np.float32) * 0.02
    block = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    with open(path, "r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        remaining = path.stat().st_size - start
        file.seek(start)
        while remaining > 0:
            remaining -= file.write(block[: min(len(block), remaining)])
    return folder


def make_tokenizer() -> dict[str, Any]:
    """tokenizer.json with as many tokens and merges as the real one, made of random bytes."""
    tokenizer, rng = tokenizer_json(), random.Random(0)
    letters = [token for token in tokenizer["model"]["vocab"] if len(token) == 1]
    vocab, merges, parts = {letter: i for i, letter in enumerate(letters)}, [], list(letters)
    while len(vocab) < _N_TOKENS:
        pair = [rng.choice(parts), rng.choice(parts)]
        token = "".join(pair)
        if token not in vocab:
            vocab[token] = len(vocab)
            merges.append(pair)
            if len(token) <= 8:
                parts.append(token)
    tokenizer["model"] |= {"vocab": vocab, "merges": merges}
    for i, item in enumerate(tokenizer["added_tokens"]):
        item["id"] = _N_TOKENS + i
    return tokenizer
