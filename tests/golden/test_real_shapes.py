"""Checkpoints with the real models' exact shapes against the inventories of the real models' GGUF files.

The weights are a hole in a sparse file: all zero, no disk. The inventories (names, shapes, types and metadata that
llama.cpp's converter wrote) are figures published at github.com/Thireus/GGUF-Tool-Suite.
"""

from __future__ import annotations

import json
import time
from math import prod
from pathlib import Path
from typing import Any

import pytest
from checkpoint_maker import make_sparse_checkpoint, text_config, tokenizer_json

from pocketquant import open_model, open_recipe, plan
from pocketquant.model import Model

INVENTORIES = json.loads((Path(__file__).parent / "real_models.json").read_text())
LAYERS = {"0.8B": 24, "2B": 24, "4B": 32, "9B": 32}
CONFIGS = {
    "0.8B": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 16,
    },
    "2B": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 16,
    },
    "9B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 32,
        "tie_word_embeddings": False,
    },
    "4B": {
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 32,
    },
}
MADE_UP = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.chat_template"}
"""Keys whose content is the test tokenizer's, not the real one's; types and lengths still have to fit."""
OTHER_VALUE = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id"}
NOT_IN_INVENTORY = {
    "pocketquant.recipe": "ours",
    "pocketquant.version": "ours",
    "general.sampling.temp": "defaults of generation_config.json, which the inventory's older converter left out",
    "general.sampling.top_k": "the same",
    "general.sampling.top_p": "the same",
    "qwen35.attention.recurrent_layers": "written by llama.cpp's converter since then, wherever layer_types is given",
}


def real_config(size: str) -> dict[str, Any]:
    """config.json of the real model: the text model under the vision-language class."""
    interval = 4
    return text_config(
        **CONFIGS[size],
        num_hidden_layers=LAYERS[size],
        head_dim=256,
        linear_num_key_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        layer_types=["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(LAYERS[size])],
        full_attention_interval=interval,
        max_position_embeddings=262144,
        vocab_size=248320,
        rope_parameters={
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000.0,
            "rope_type": "default",
        },
    )


@pytest.fixture(scope="module", params=["0.8B", "4B"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Model]:
    """Size and opened model."""
    size: str = request.param
    folder = tmp_path_factory.mktemp("real") / f"Qwen3.5-{size}"
    make_sparse_checkpoint(folder, real_config(size))
    card = f"""---
license: apache-2.0
license_link: https://huggingface.co/Qwen/Qwen3.5-{size}/blob/main/LICENSE
pipeline_tag: image-text-to-text
base_model:
- Qwen/Qwen3.5-{size}-Base
---
# Qwen3.5-{size}
"""
    (folder / "README.md").write_text(card)
    text = real_config(size)
    outer = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "tie_word_embeddings": True,
        "text_config": text,
    }
    (folder / "config.json").write_text(json.dumps(outer))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return size, open_model(folder)


def test_names_shapes_and_types_equal_the_real_files(real: tuple[str, Model]) -> None:
    size, model = real
    ours = {
        item.tensor.name: [item.format.name, list(item.tensor.shape), item.nbytes]
        for item in plan(model, open_recipe("bf16")).tensors
    }
    assert ours == INVENTORIES[size]["tensors"]


def test_metadata_equals_the_real_files_key_by_key(real: tuple[str, Model]) -> None:
    size, model = real
    kinds = {"arr[str,1]": "str[]", "arr[i32,4]": "i32[]"}
    ours = dict(plan(model, open_recipe("bf16")).metadata)
    for key, entry in INVENTORIES[size]["metadata"].items():
        value = ours.pop(key)
        expected = kinds.get(entry["type"], entry["type"])
        if key in MADE_UP | OTHER_VALUE:
            assert value.kind == (expected if "[" not in expected else f"{expected[4:7]}[]"), key
            if key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
                assert len(value.value) == 248320
            continue
        assert value.kind == expected, key
        wanted = json.loads(entry["value"]) if expected.endswith("[]") else entry["value"]
        if isinstance(wanted, str) and wanted.endswith("..."):
            assert value.value.startswith(wanted[:-3]), key  # the inventory cuts long texts
        else:
            assert value.value == pytest.approx(wanted), key
    assert ours.keys() == NOT_IN_INVENTORY.keys()


@pytest.mark.parametrize("size", CONFIGS)
def test_planned_in_five_seconds_with_a_vocabulary_of_the_real_size(size: str, tmp_path: Path) -> None:
    folder = make_sparse_checkpoint(tmp_path / f"Qwen3.5-{size}", real_config(size))
    (folder / "tokenizer.json").write_text(json.dumps(large_tokenizer(248044)))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    (folder / "generation_config.json").write_text("{}")
    started = time.process_time()
    planned = plan(open_model(folder), open_recipe("q4_k_m"))
    assert time.process_time() - started < 5
    assert len(planned.metadata["tokenizer.ggml.merges"].value) == 248044 - 256
    assert planned.file_bytes > {"0.8B": 4e8, "2B": 1e9, "4B": 2.6e9, "9B": 5e9}[size]


def large_tokenizer(n_tokens: int) -> dict[str, Any]:
    """The test tokenizer grown to the real one's size: every pair of bytes, then triples, each by one merge."""
    tokenizer = tokenizer_json()
    letters = [token for token in tokenizer["model"]["vocab"] if len(token) == 1]
    pairs = [[a, b] for a in letters for b in letters]
    triples = ([a + b, c] for a, b in pairs for c in letters)
    merges = (pairs + [next(triples) for _ in range(max(0, n_tokens - 256 - len(pairs)))])[: n_tokens - 256]
    vocab = letters + ["".join(merge) for merge in merges]
    tokenizer["model"] |= {"vocab": {token: number for number, token in enumerate(vocab)}, "merges": merges}
    for number, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = n_tokens + number
    return tokenizer


@pytest.mark.parametrize("recipe", ["q4_k_m", "pocket_4bit"])
def test_4b_fits_three_gigabytes(real: tuple[str, Model], recipe: str) -> None:
    size, model = real
    planned = plan(model, open_recipe(recipe))
    assert planned.file_bytes < {"0.8B": 0.6e9, "4B": 3.0e9}[size]
    assert sum(prod(item.tensor.shape) for item in planned.tensors) > {"0.8B": 7.5e8, "4B": 4.2e9}[size]
