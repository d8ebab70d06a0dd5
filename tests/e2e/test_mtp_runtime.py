"""The runtime on files with a multi-token-prediction block, beside one, and in shards."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, mtp_weights_for, text_config, weights_for

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.convert.checkpoint import open_checkpoint, open_mtp
from pocketquant.gguf_file.shards import split_plan
from pocketquant.gguf_file.writing import write_together
from pocketquant.llama.runtime import open_runtime

llama = pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

TOKENS = [104, 256, 10, 99, 258, 257, 31, 7, 200, 13]


@pytest.fixture(scope="module")
def checkpoint_with_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = weights_for(text_config()) | mtp_weights_for(text_config())
    return make_checkpoint(tmp_path_factory.mktemp("mtp") / "Tiny-1M", dtype="F32", weights=weights)


def logits_of(path: Path) -> np.ndarray:
    with open_runtime(path, context=64, threads=1) as runtime:
        return np.concatenate([rows.copy() for _, rows in runtime.logits(TOKENS)])


@pytest.mark.parametrize("recipe_name", ["f32", "q8_0"])
def test_trunks_logits_are_the_same_with_the_block(recipe_name: str, checkpoint_with_mtp: Path, tmp_path: Path) -> None:
    recipe = open_recipe(recipe_name)
    write(plan(open_checkpoint(checkpoint_with_mtp), recipe), tmp_path / "trunk.gguf")
    write(plan(open_checkpoint(checkpoint_with_mtp, mtp="embed"), recipe), tmp_path / "embed.gguf")
    trunk = logits_of(tmp_path / "trunk.gguf")
    assert np.ptp(trunk) > 0.1
    assert np.array_equal(trunk, logits_of(tmp_path / "embed.gguf"))


def test_irregular_layers_load_with_the_block(tmp_path: Path) -> None:
    config = text_config(layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"])
    weights = weights_for(config) | mtp_weights_for(config)
    folder = make_checkpoint(tmp_path / "c", weights=weights, layer_types=config["layer_types"])
    write(plan(open_checkpoint(folder), open_recipe("bf16")), tmp_path / "trunk.gguf")
    write(plan(open_checkpoint(folder, mtp="embed"), open_recipe("bf16")), tmp_path / "embed.gguf")
    assert np.array_equal(logits_of(tmp_path / "trunk.gguf"), logits_of(tmp_path / "embed.gguf"))


@pytest.mark.parametrize("limit", [6_000_000, 1_000_000])
def test_shards_give_the_same_logits(limit: int, checkpoint_with_mtp: Path, tmp_path: Path) -> None:
    planned = plan(open_model(checkpoint_with_mtp), open_recipe("bf16"))
    write(planned, tmp_path / "whole.gguf")
    files = split_plan(planned, tmp_path / "part.gguf", limit)
    write_together(files)
    assert np.array_equal(logits_of(tmp_path / "whole.gguf"), logits_of(files[0][1]))


def test_a_first_shard_of_metadata_alone_loads(tmp_path: Path) -> None:
    planned = plan(open_model(make_checkpoint(tmp_path / "c", vocab_size=1024)), open_recipe("bf16"))
    largest = planned.tensors[0].nbytes  # the embedding, which does not fit beside the vocabulary
    write(planned, tmp_path / "whole.gguf")
    files = split_plan(planned, tmp_path / "part.gguf", largest + 300)
    assert not files[0][0].tensors
    write_together(files)
    assert np.array_equal(logits_of(tmp_path / "whole.gguf"), logits_of(files[0][1]))
    assert len(open_model(files[0][1]).tensors) == len(planned.tensors)


# ---------------------------------------------------------------- what the block predicts


@contextmanager
def drafting(path: Path) -> Iterator[Any]:
    """A context that runs the multi-token-prediction block of a file."""
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.load_mtp = True
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"{path} does not load"
    try:
        assert llama.llama_model_n_layer_nextn(model) == 1
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_threads, settings.ctx_type = 64, 8, 1, 1  # LLAMA_CONTEXT_TYPE_MTP
        settings.flash_attn_type = 0
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        context = llama.llama_init_from_model(model, settings)
        assert context, f"{path}: no context"
        try:
            yield context
        finally:
            llama.llama_free(context)
    finally:
        llama.llama_model_free(model)


def draft(path: Path, tokens: list[int], hidden: np.ndarray, n_vocab: int) -> np.ndarray:
    """Logits of the block after each token, given the trunk's hidden state before it, f32[n, n_vocab]."""
    with drafting(path) as context:
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        values = np.ascontiguousarray(hidden, np.float32)
        batch.embd = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert llama.llama_decode(context, batch) == 0
        rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (n_vocab,)) for i in range(len(tokens))]
        logits = np.array(rows)
        batch.embd = None  # numpy's, not to be freed with the batch
        llama.llama_batch_free(batch)
    return logits


def expected_draft(weights: dict[str, np.ndarray], tokens: list[int], hidden: np.ndarray) -> np.ndarray:
    """The same from the checkpoint's own numbers, by the maths of transformers' Qwen3.5 block, f64[n, n_vocab]."""
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    config, block, n = text_config(), "mtp.layers.0.", len(tokens)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"]) * (1 + w[name])

    def rotate(x: np.ndarray) -> np.ndarray:  # a quarter of each head; all three of text's positions are one
        n_rotated = x.shape[-1] // 4
        frequencies = config["rope_parameters"]["rope_theta"] ** (-np.arange(0, n_rotated, 2) / n_rotated)
        angles = (np.arange(n)[:, None] * frequencies)[:, None]
        first, second, rest = np.split(x, [n_rotated // 2, n_rotated], axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    embedding = norm(w["model.embed_tokens.weight"][tokens], "mtp.pre_fc_norm_embedding.weight")
    x = np.concatenate([embedding, norm(hidden, "mtp.pre_fc_norm_hidden.weight")], axis=1) @ w["mtp.fc.weight"].T
    y = norm(x, block + "input_layernorm.weight")
    n_head, n_kv, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    attention = block + "self_attn."
    query, gate = np.split((y @ w[attention + "q_proj.weight"].T).reshape(n, n_head, 2 * head_dim), 2, axis=-1)
    key, value = ((y @ w[f"{attention}{k}_proj.weight"].T).reshape(n, n_kv, head_dim) for k in "kv")
    query, key = (rotate(norm(x, f"{attention}{k}_norm.weight")) for k, x in (("q", query), ("k", key)))
    key, value = (x.repeat(n_head // n_kv, axis=1) for x in (key, value))
    scores = np.einsum("ihd,jhd->hij", query, key) / head_dim**0.5
    scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = np.einsum("hij,jhd->ihd", shares, value) / (1 + np.exp(-gate))
    x = x + mixed.reshape(n, -1) @ w[attention + "o_proj.weight"].T
    y = norm(x, block + "post_attention_layernorm.weight")
    gate, up = (y @ w[f"{block}mlp.{k}_proj.weight"].T for k in ("gate", "up"))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ w[block + "mlp.down_proj.weight"].T
    return norm(x, "mtp.norm.weight") @ w["model.embed_tokens.weight"].T


@pytest.mark.parametrize("part", ["sidecar", "embed"])
def test_block_predicts_what_the_checkpoints_numbers_say(part: str, checkpoint_with_mtp: Path, tmp_path: Path) -> None:
    model = open_mtp(checkpoint_with_mtp) if part == "sidecar" else open_checkpoint(checkpoint_with_mtp, mtp="embed")
    assert model is not None
    write(plan(model, open_recipe("f32")), tmp_path / "draft.gguf")
    weights = weights_for(text_config()) | mtp_weights_for(text_config())
    for tokens, seed in (([104], 0), ([13, 104, 256, 7, 99, 31], 1)):
        hidden = np.random.default_rng(seed).standard_normal((len(tokens), 256))
        logits = draft(tmp_path / "draft.gguf", tokens, hidden, n_vocab=320)
        expected = expected_draft(weights, tokens, hidden)
        assert np.ptp(expected, axis=1).min() > 0.1
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.ptp(expected))


# ---------------------------------------------------------------- command line


COMMAND = str(Path(sys.executable).with_name("pocketquant"))


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def test_split_join_and_split_anew(checkpoint: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    run("quantize", checkpoint, "--out", whole, "--recipe", "q4_k_m")
    made = json.loads(run("split", whole, "--out", tmp_path / "a.gguf", "--split-max-size", "500k", "--json").stdout)
    paths = [Path(entry["file"]) for entry in made["files"]]
    assert paths == sorted(tmp_path.glob("a-*.gguf"))
    assert [entry["file_bytes"] for entry in made["files"]] == [path.stat().st_size for path in paths]
    run("split", paths[0], "--out", tmp_path / "b.gguf", "--split-max-size", "300KiB")
    [first] = tmp_path.glob("b-00001-of-*.gguf")
    run("join", first, "--out", tmp_path / "joined.gguf")
    assert (tmp_path / "joined.gguf").read_bytes() == whole.read_bytes()
    listed = json.loads(run("inspect", first, "--json").stdout)
    assert listed["file_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("b-*.gguf"))
    assert len(listed["tensors"]) == len(open_model(whole).tensors)


@pytest.mark.parametrize("command", [("convert",), ("quantize", "--recipe", "q8_0")])
def test_output_in_shards_and_its_dry_run(command: tuple[str, ...], checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    arguments = (*command, checkpoint, "--out", out, "--split-max-size", "1M")
    planned = json.loads(run(*arguments, "--dry-run", "--json").stdout)["files"]
    assert not list(tmp_path.iterdir())
    shown = run(*arguments, "--dry-run").stdout
    assert all(f"{entry['file']}: {entry['file_bytes']:,} bytes" in shown for entry in planned)
    run(*arguments)
    assert {entry["file"]: entry["file_bytes"] for entry in planned} == {
        path.name: path.stat().st_size for path in tmp_path.iterdir()
    }
    assert len(planned) > 1


@pytest.mark.parametrize(("size", "message"), [("many", "no size"), ("2k", "the metadata takes")])
def test_limits_that_cannot_be_kept(size: str, message: str, checkpoint: Path, tmp_path: Path) -> None:
    result = run("convert", checkpoint, "--out", tmp_path / "a.gguf", "--split-max-size", size, code=2)
    assert message in result.stderr
    assert not list(tmp_path.iterdir())
