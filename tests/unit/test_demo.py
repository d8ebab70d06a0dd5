"""The embedded default: small enough to ship, whole, and hard enough to mean something."""

from __future__ import annotations

import json

import pytest

from pocketquant import open_model
from pocketquant.demo import TEXTS, checkpoint_dir, text_path
from pocketquant.errors import SourceError


def test_fits_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in checkpoint_dir().iterdir()) <= 8_000_000


def test_opens_with_more_value_heads_than_key_heads_and_a_padded_vocabulary() -> None:
    model = open_model(checkpoint_dir())
    assert model.sizes["n_v"] == 2 * model.sizes["n_k"]
    assert model.is_tied
    tokens = model.metadata["tokenizer.ggml.tokens"].value
    assert len(tokens) == model.sizes["n_vocab"] == 1536
    assert tokens[-1] == "[PAD1535]"
    assert model.notes == ()


def test_texts_are_shipped_and_share_no_document() -> None:
    documents = {name: set(text_path(name).read_text(encoding="utf-8").split("<|endoftext|>")) for name in TEXTS}
    assert all(len(texts) > 20 for texts in documents.values())
    assert not {text for text in documents["calibration"] & documents["evaluation"] if text.strip()}
    with pytest.raises(SourceError, match="no embedded text is called 'poems'"):
        text_path("poems")


def test_config_is_the_familys() -> None:
    config = json.loads((checkpoint_dir() / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForCausalLM"]
    assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
