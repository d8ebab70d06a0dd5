"""`fit` against llama.cpp for the exact shapes of the real models, up to their whole context; no weights, no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_maker import make_sparse_checkpoint
from llama_memory import MIB, hollow_gguf, loaded
from test_real_shapes import CONFIGS, real_config

from pocketquant import open_model, open_recipe, plan
from pocketquant.fit import Settings, device_named, fit, memory_parts, weights_of

CONTEXTS = (512, 4096, 32768, 262144)
NAMES = {"KV": "KV cache", "RS": "DeltaNet state", "compute": "compute buffer"}


@pytest.mark.parametrize("size", CONFIGS)
def test_buffers_of_the_real_shapes(size: str, tmp_path: Path) -> None:
    model = open_model(make_sparse_checkpoint(tmp_path / size, real_config(size)))
    planned = plan(model, open_recipe("q4_k_m"))
    weights = weights_of(planned, model)
    with loaded(hollow_gguf(tmp_path / f"{size}.gguf", planned)) as runtime:
        for context in CONTEXTS:
            for flash_attention in (True, False):
                for outputs in (1, 512):
                    settings = Settings(context, outputs=outputs, flash_attention=flash_attention)
                    parts = {part.name: part.nbytes for part in memory_parts(weights, settings, "none")}
                    for key, measured in runtime.measure(settings).items():
                        assert parts[NAMES[key]] == pytest.approx(measured, rel=1e-4, abs=0.0051 * MIB), settings


def test_every_fourth_block_has_a_cache(tmp_path: Path) -> None:
    """The 4B model by hand: planners that give all 32 blocks a cache are four times off."""
    model = open_model(make_sparse_checkpoint(tmp_path / "4B", real_config("4B")))
    planned = plan(model, open_recipe("q4_k_m"))
    found = fit(weights_of(planned, model), Settings(32768), device=device_named("laptop-16gb"))
    parts = {part.name: part.nbytes for part in found.parts}
    heads, head_dim, keys_and_values, f16 = 4, 256, 2, 2
    assert parts["KV cache"] == 32768 * 8 * heads * head_dim * keys_and_values * f16
    assert parts["DeltaNet state"] == 24 * (32 * 128 * 128 + 3 * 8192) * 4
    assert found.fits
    assert 100_000 < found.longest_context <= 262_144
