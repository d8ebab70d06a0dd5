"""Importance of a multi-token-prediction block: its inputs' mean squares against the block's maths, files, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, moe_config, mtp_weights_for, text_config, weights_for

from pocketquant import open_recipe, plan, write
from pocketquant.calibration.imatrix import collect_importance
from pocketquant.calibration.importance import merge_sums, read_sums, write_sums
from pocketquant.convert.checkpoint import open_checkpoint, open_mtp
from pocketquant.demo import text_path
from pocketquant.errors import EvalError, RecipeError
from pocketquant.gguf_file.reading import read_header
from pocketquant.quant import read_importance
from pocketquant.texts.calibration import CalibrationSettings

llama = pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

COMMAND = str(Path(sys.executable).with_name("pocketquant"))
TEXT = text_path("calibration")
CONTEXT = 600  # more than one batch
WEIGHTS = weights_for(text_config()) | mtp_weights_for(text_config())


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its trunk, its block, and the two in one file."""
    folder = tmp_path_factory.mktemp("mtp")
    source = make_checkpoint(folder / "Tiny-1M", dtype="F32", weights=WEIGHTS)
    block = open_mtp(source)
    assert block is not None
    for name, model in (
        ("trunk", open_checkpoint(source)),
        ("mtp", block),
        ("embed", open_checkpoint(source, mtp="embed")),
    ):
        write(plan(model, open_recipe("f32")), folder / f"{name}.gguf")
    return folder


def hidden_states(path: Path, tokens: np.ndarray) -> np.ndarray:
    """The trunk's states after its last norm, as llama.cpp hands out embeddings, f64[n, 256]."""
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 1024
    settings.embeddings, settings.pooling_type, settings.n_threads = True, 0, 1  # LLAMA_POOLING_TYPE_NONE
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = int(token), i, 1, 0, 1
    assert llama.llama_decode(context, batch) == 0
    states = np.ctypeslib.as_array(llama.llama_get_embeddings(context), (len(tokens), 256)).astype(np.float64)
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return states


def rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotary embedding of f64[n, n_head, head_dim]; for text, the sections of the three position ids are all alike."""
    rope = text_config()["rope_parameters"]
    half = int(x.shape[-1] * rope["partial_rotary_factor"]) // 2
    angles = positions[:, None] / rope["rope_theta"] ** (np.arange(half) / half)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine, x[..., 2 * half :]], axis=-1)


def expected_inputs(tokens: np.ndarray, hidden: np.ndarray) -> dict[str, np.ndarray]:
    """What each weight of the block is multiplied with, by the maths of transformers' Qwen3.5 attention block."""
    w = {name: values.astype(np.float64) for name, values in WEIGHTS.items()}
    config, block = text_config(), "mtp.layers.0."
    n_head, n_kv, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    n = len(tokens)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"]) * (1 + w[name])

    def times(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[block + name + ".weight"].T

    embedding = norm(w["model.embed_tokens.weight"][tokens], "mtp.pre_fc_norm_embedding.weight")
    joined = np.concatenate([embedding, norm(hidden, "mtp.pre_fc_norm_hidden.weight")], axis=1)
    x = joined @ w["mtp.fc.weight"].T
    y = norm(x, block + "input_layernorm.weight")
    both = times(y, "self_attn.q_proj").reshape(n, n_head, 2, head_dim)
    positions = np.arange(n)
    q = rotated(norm(both[:, :, 0], block + "self_attn.q_norm.weight"), positions)
    k = times(y, "self_attn.k_proj").reshape(n, n_kv, head_dim)
    k = rotated(norm(k, block + "self_attn.k_norm.weight"), positions).repeat(n_head // n_kv, axis=1)
    v = times(y, "self_attn.v_proj").reshape(n, n_kv, head_dim).repeat(n_head // n_kv, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim)
    scores = np.where(np.tril(np.ones((n, n), bool)), np.exp(scores), 0)
    attended = np.einsum("hqk,khd->qhd", scores / scores.sum(axis=-1, keepdims=True), v)
    attended = (attended / (1 + np.exp(-both[:, :, 1]))).reshape(n, -1)
    x = x + times(attended, "self_attn.o_proj")
    z = norm(x, block + "post_attention_layernorm.weight")
    gate = times(z, "mlp.gate_proj")
    return {
        "nextn.eh_proj": joined,
        **dict.fromkeys(("attn_q", "attn_k", "attn_v"), y),
        "attn_output": attended,
        **dict.fromkeys(("ffn_gate", "ffn_up"), z),
        "ffn_down": gate / (1 + np.exp(-gate)) * times(z, "mlp.up_proj"),
    }


@pytest.mark.parametrize("part", ["embed", "trunk"])
def test_mean_squares_are_those_of_the_blocks_maths(part: str, folder: Path) -> None:
    sums, calibration = collect_importance(
        folder / f"{part}.gguf",
        TEXT,
        CalibrationSettings(CONTEXT, 2, threads=1),
        mtp=folder / "mtp.gguf" if part == "trunk" else None,
    )
    expected: dict[str, np.ndarray] = {}
    for window in calibration.windows:
        hidden = hidden_states(folder / "trunk.gguf", window)
        for name, inputs in expected_inputs(window[1:], hidden[:-1]).items():
            expected[name] = expected.get(name, 0) + np.square(inputs).sum(axis=0)
    found = {name: array[0] for name, array in sums.sums.items() if name.startswith("blk.4.")}
    assert found.keys() == {f"blk.4.{name}.weight" for name in expected}
    for name, array in expected.items():
        assert np.ptp(array) > 0.1 * array.mean()  # a wrong order of columns could not pass
        # the cache of keys and values is F16
        np.testing.assert_allclose(found[f"blk.4.{name}.weight"], array, rtol=5e-3, err_msg=name)
        assert sums.counts[f"blk.4.{name}.weight"] == 2 * (CONTEXT - 1)
    assert (sums.n_chunks, sums.context) == (2, CONTEXT)


def test_the_trunks_sums_are_the_same_with_the_block(folder: Path) -> None:
    def collect(name: str, mtp: Path | None = None) -> dict[str, np.ndarray]:
        sums, _ = collect_importance(folder / name, TEXT, CalibrationSettings(128, 2, threads=1), mtp=mtp)
        return dict(sums.sums)

    alone = collect("trunk.gguf")
    embedded, beside = collect("embed.gguf"), collect("trunk.gguf", folder / "mtp.gguf")
    assert embedded.keys() == beside.keys() > alone.keys()
    for name, array in embedded.items():
        np.testing.assert_array_equal(array, beside[name], err_msg=name)
        if name in alone:
            np.testing.assert_array_equal(array, alone[name], err_msg=name)


def test_experts_of_the_block(tmp_path: Path) -> None:
    weights = weights_for(moe_config()) | mtp_weights_for(moe_config())
    source = make_checkpoint(tmp_path / "Tiny-MoE", dtype="F32", weights=weights, **moe_config())
    write(plan(open_checkpoint(source, mtp="embed"), open_recipe("f32")), tmp_path / "embed.gguf")
    sums, _ = collect_importance(tmp_path / "embed.gguf", TEXT, CalibrationSettings(128, 2, threads=1))
    counts = {name: counts for name, counts in sums.counts.items() if name.startswith("blk.4.")}
    assert {name for name in counts if "_exps" in name} == {
        f"blk.4.ffn_{x}_exps.weight" for x in ("gate", "up", "down")
    }
    for name, array in counts.items():
        assert array.sum() == 2 * 127 * (2 if "_exps" in name else 1), name  # two experts for each token
    matrices = [t.name for t in read_header(tmp_path / "embed.gguf").tensors if t.name.startswith("blk.4.")]
    assert counts.keys() == {name for name in matrices if name.endswith(".weight") and "norm" not in name}


def test_an_interrupted_run_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def collect(out: str, stop_after: int | None = None, mtp: Path | None = folder / "mtp.gguf") -> None:
        def stop(done: int, _: int) -> None:
            if done == stop_after:
                raise Stop

        sums, _ = collect_importance(
            folder / "trunk.gguf",
            TEXT,
            CalibrationSettings(128, 3, threads=1, save_seconds=0),
            mtp=mtp,
            state=tmp_path / "state",
            resume=True,
            progress=stop,
        )
        write_sums(sums, tmp_path / out)
        (tmp_path / "state").unlink(missing_ok=True)

    collect("whole.gguf")
    with pytest.raises(Stop):
        collect("cut.gguf", stop_after=2)
    assert (tmp_path / "state").exists()
    with pytest.raises(EvalError, match=r"other settings \(mtp\)"):
        collect("cut.gguf", mtp=None)
    collect("cut.gguf")
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    with pytest.raises(RecipeError, match="the same text would count it twice"):
        merge_sums([read_sums(tmp_path / "cut.gguf")] * 2)
    merged = merge_sums([read_sums(tmp_path / "cut.gguf")])
    assert merged.counts["blk.4.nextn.eh_proj.weight"] == 3 * 127


def test_quantize_rounds_the_sidecar_with_it(folder: Path, tmp_path: Path) -> None:
    made = json.loads(
        run(
            "imatrix",
            folder / "trunk.gguf",
            "--mtp",
            folder / "mtp.gguf",
            "--text",
            TEXT,
            "--context",
            128,
            "--chunks",
            2,
            "-o",
            tmp_path / "m.gguf",
            "--json",
        ).stdout
    )
    importance = read_importance(tmp_path / "m.gguf")
    assert made["entries"] == len(importance.weights)
    source, recipe = folder / "Tiny-1M", ("--recipe", "q4_k_m")
    run("quantize", source, *recipe, "-o", tmp_path / "plain.gguf")
    run("quantize", source, *recipe, "--imatrix", tmp_path / "m.gguf", "-o", tmp_path / "with.gguf")
    run("quantize", source, *recipe, "--imatrix", tmp_path / "m.gguf", "--mtp", "embed", "-o", tmp_path / "embed.gguf")

    def stored(path: Path) -> dict[str, bytes]:
        data = path.read_bytes()
        return {t.name: data[t.offset : t.offset + t.nbytes] for t in read_header(path).tensors}

    plain, weighted = stored(tmp_path / "mtp-plain.gguf"), stored(tmp_path / "mtp-with.gguf")
    quantized = [t.name for t in read_header(tmp_path / "mtp-with.gguf").tensors if t.name in importance.weights]
    assert len(quantized) == 8
    changed = {name for name in plain if plain[name] != weighted[name]}
    assert changed == {name for name in quantized if _type(tmp_path / "mtp-with.gguf", name) != "Q8_0"}
    assert changed
    embedded = stored(tmp_path / "embed.gguf")
    assert all(embedded[name] == weighted[name] for name in quantized)
    metadata = read_header(tmp_path / "mtp-with.gguf").metadata
    assert metadata["quantize.imatrix.entries_count"].value == 8
    assert "quantize.imatrix.file" not in read_header(tmp_path / "mtp-plain.gguf").metadata


def _type(path: Path, name: str) -> str:
    return next(tensor.format.name for tensor in read_header(path).tensors if tensor.name == name)


def test_refuses_a_sidecar_of_another_model(folder: Path, tmp_path: Path) -> None:
    layers = ["linear_attention", "full_attention"]
    config = text_config(num_hidden_layers=2, layer_types=layers)
    other = make_checkpoint(tmp_path / "c", weights=weights_for(config), num_hidden_layers=2, layer_types=layers)
    write(plan(open_checkpoint(other), open_recipe("f32")), tmp_path / "other.gguf")
    cases = {
        (tmp_path / "other.gguf", folder / "mtp.gguf"): "follows 4 blocks of width 256, but other.gguf has 2",
        (folder / "trunk.gguf", tmp_path / "other.gguf"): "holds no multi-token-prediction block; give",
        (folder / "embed.gguf", folder / "mtp.gguf"): "holds a multi-token-prediction block itself",
    }
    for (model, mtp), message in cases.items():
        with pytest.raises(EvalError, match=message):
            collect_importance(model, TEXT, CalibrationSettings(64, 1, threads=1), mtp=mtp)
    sums, _ = collect_importance(folder / "embed.gguf", TEXT, CalibrationSettings(64, 1, threads=1))
    write_sums(sums, tmp_path / "m.gguf")
    with pytest.raises(RecipeError, match=r"\d+ entries do not fit(.|\n)*: no such tensor"):
        plan(open_checkpoint(other), open_recipe("q4_k_m"), read_importance(tmp_path / "m.gguf"))
