"""The three ways to run an adapter give one model: merged on the way in, and as a GGUF beside the base in llama.cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_maker import (
    checkpoint_shapes,
    expert_factors,
    expert_tensors,
    make_adapter,
    matrices_for,
    write_adapter,
    write_expert_adapter,
)
from checkpoint_maker import make_checkpoint, moe_config
from moe_checkpoint import golden_checkpoint

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.cli.app import app
from pocketquant.demo import checkpoint_dir, text_path
from pocketquant.llama.library import require_runtime

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'pocketquant[eval]'")
N_TOKENS = 256


def log_probabilities(
    gguf: Path, tokens: list[int] | None, adapter: Path | None = None
) -> tuple[np.ndarray, list[int]]:
    """f64[n, n_vocab] after each token, by llama.cpp, and the tokens; the embedded text's where None."""
    library = require_runtime()
    model = library.llama_model_load_from_file(str(gguf).encode(), library.llama_model_default_params())
    assert model
    vocab = library.llama_model_get_vocab(model)
    if tokens is None:
        text = text_path("evaluation").read_bytes()[:4000]
        buffer = (library.llama_token * len(text))()
        count = library.llama_tokenize(vocab, text, len(text), buffer, len(buffer), False, False)
        tokens = list(buffer[: min(count, N_TOKENS)])
    params = library.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(tokens)
    params.n_threads = params.n_threads_batch = 1
    context = library.llama_init_from_model(model, params)
    assert context
    if adapter is not None:
        loaded = library.llama_adapter_lora_init(model, str(adapter).encode())
        assert loaded, "llama.cpp refuses the adapter"
        one = (library.llama_adapter_lora_p_ctypes * 1)(ctypes.cast(loaded, library.llama_adapter_lora_p_ctypes))
        assert library.llama_set_adapters_lora(context, one, 1, (ctypes.c_float * 1)(1.0)) == 0
    batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert library.llama_decode(context, batch) == 0
    n_vocab = library.llama_vocab_n_tokens(vocab)
    rows = np.ctypeslib.as_array(library.llama_get_logits(context), shape=(len(tokens), n_vocab)).astype(np.float64)
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)), tokens


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence in nats."""
    return float((np.exp(reference) * (reference - other)).sum(axis=1).mean())


def run(*arguments: Any) -> None:
    """A command, in this process."""
    app(args=[*map(str, arguments), "--quiet"], prog_name="pocketquant", standalone_mode=False)


def three_models(folder: Path, checkpoint: Path, adapter: Path, type_name: str = "f32") -> tuple[float, float]:
    """KL divergence of the base, and of the base with the GGUF adapter beside it, from the merged model."""
    run("convert", checkpoint, "--type", "f32", "--out", folder / "base.gguf")
    run("convert", checkpoint, "--type", "f32", "--adapter", adapter, "--out", folder / "merged.gguf")
    run("adapter", adapter, "--base", checkpoint, "--type", type_name, "--out", folder / "lora.gguf")
    merged, tokens = log_probabilities(folder / "merged.gguf", None)
    base, _ = log_probabilities(folder / "base.gguf", tokens)
    beside, _ = log_probabilities(folder / "base.gguf", tokens, folder / "lora.gguf")
    assert len(tokens) == N_TOKENS
    return divergence(merged, base), divergence(merged, beside)


@pytest.mark.parametrize("rslora", [False, True])
def test_breaks_today_08_lora_adapter_beside_the_base_is_the_merged_model(rslora: bool, tmp_path: Path) -> None:
    # alphas and ranks that differ: llama.cpp has one alpha for the file and divides by each pair's rank
    config = {"alpha_pattern": {"in_proj_qkv": 4, r"layers\.1\..*\.out_proj": 24}, "use_rslora": rslora}
    ranks = {"in_proj_z": 7, "down_proj": 2}
    adapter = make_adapter(tmp_path / "lora", checkpoint_dir(), ranks=ranks, size=0.25, lora_alpha=8, **config)
    changed, beside = three_models(tmp_path, checkpoint_dir(), adapter)
    assert changed > 0.01
    assert beside < 1e-6


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_half_precision_costs_little(type_name: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "lora", checkpoint_dir(), size=0.25)
    changed, beside = three_models(tmp_path, checkpoint_dir(), adapter, type_name)
    assert changed > 0.01
    assert beside < 1e-4 * changed


def test_embedding_and_head_where_they_are_two(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "untied", tie_word_embeddings=False)
    adapter = make_adapter(tmp_path / "lora", checkpoint, more=("model.embed_tokens", "lm_head"))
    changed, beside = three_models(tmp_path, checkpoint, adapter)
    assert changed > 0.01
    assert beside < 1e-6


DENSE = [
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_a", "linear_attn.in_proj_b"),
    *("linear_attn.out_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "embed_tokens", "lm_head"),
]


@pytest.mark.parametrize("module", DENSE)
def test_breaks_today_08_every_target_module_in_both_forms(module: str, tmp_path: Path) -> None:
    """One module at a time, so that none can hide behind the others."""
    checkpoint = make_checkpoint(tmp_path / "untied", tie_word_embeddings=False)
    shapes = checkpoint_shapes(checkpoint)
    names = [name.removesuffix(".weight") for name in shapes if name.endswith(f"{module}.weight")]
    tensors = matrices_for({name: shapes[f"{name}.weight"] for name in names}, 4, size=30.0)
    changed, beside = three_models(tmp_path, checkpoint, write_adapter(tmp_path / "lora", tensors))
    assert changed > 1e-5
    assert beside < 1e-4 * min(changed, 1.0)


@pytest.mark.parametrize("layout", ["fused", "one by one"])
def test_breaks_today_08_experts_beside_the_base_are_the_merged_model(layout: str, tmp_path: Path) -> None:
    checkpoint = golden_checkpoint(tmp_path / "mixture")
    only = (0, 3, 5) if layout == "one by one" else None
    factors = expert_factors(moe_config(), rank=4, size=4.0)
    adapter = write_expert_adapter(tmp_path / "lora", factors, layout, only, lora_alpha=8)
    changed, beside = three_models(tmp_path, checkpoint, adapter)
    assert changed > 1e-3
    assert beside < 1e-6


def test_experts_of_several_ranks_and_alphas(tmp_path: Path) -> None:
    """llama.cpp has one rank for all experts of a tensor and one alpha for the file."""
    checkpoint = golden_checkpoint(tmp_path / "mixture")
    wide, narrow = (expert_factors(moe_config(), rank=rank, seed=rank, size=4.0) for rank in (4, 2))
    tensors = expert_tensors(wide, "one by one", (0, 3)) | expert_tensors(narrow, "one by one", (5,))
    patterns = {"rank_pattern": {r"experts\.5\.(gate|up|down)_proj": 2}, "alpha_pattern": {r"experts\.3\.up_proj": 24}}
    adapter = write_adapter(tmp_path / "lora", tensors, r=4, lora_alpha=8, **patterns)
    changed, beside = three_models(tmp_path, checkpoint, adapter)
    assert changed > 1e-3
    assert beside < 1e-6


def test_llama_cpp_refuses_the_adapter_of_another_model(tmp_path: Path) -> None:
    """That loading fails where shapes differ, so that the tests above cannot pass by ignoring the file."""
    checkpoint = make_checkpoint(tmp_path / "other", intermediate_size=768)
    run("convert", checkpoint, "--type", "f32", "--out", tmp_path / "other.gguf")
    adapter = make_adapter(tmp_path / "lora", checkpoint)
    run("adapter", adapter, "--base", checkpoint, "--out", tmp_path / "lora.gguf")
    base = tmp_path / "base.gguf"
    write(plan(open_model(make_checkpoint(tmp_path / "base")), open_recipe("f32")), base)
    with pytest.raises(AssertionError, match=r"llama\.cpp refuses the adapter"):
        log_probabilities(base, [1, 2, 3], tmp_path / "lora.gguf")
