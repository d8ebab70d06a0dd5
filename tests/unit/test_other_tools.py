"""GGUF files as other tools leave them: read where llama.cpp runs them, named where it does not."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from check_maker import make_good_gguf, make_trained_checkpoint, set_key
from gguf_maker import Parts, changed
from moe_checkpoint import golden_checkpoint
from other_tools import GATE_UP, QKV, Change

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.check import check_gguf
from pocketquant.errors import ArchitectureError, SourceError
from pocketquant.eval import weight_errors
from pocketquant.gguf_file.opening import open_gguf, open_unfused
from pocketquant.model import Model, Value
from pocketquant.quant import Importance


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return make_good_gguf(make_trained_checkpoint(folder / "c"), folder / "good.gguf")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    return make_good_gguf(golden_checkpoint(folder / "c"), folder / "good.gguf")


def rows_of(model: Model) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.rows(0, tensor.n_rows).reshape(tensor.shape) for tensor in model.tensors}


def both(parts: Parts) -> None:
    QKV(parts)
    GATE_UP(parts)


def flat_gates(parts: Parts) -> None:
    """What llama.cpp's quantizer does to a matrix of one row."""
    for name, (values, kind) in parts.tensors.items():
        if len(values.shape) > 1 and values.shape[0] == 1:
            parts.tensors[name] = (values.reshape(-1), kind)


@pytest.mark.parametrize("change", [QKV, GATE_UP, both, flat_gates], ids=["qkv", "experts", "both", "one row"])
def test_a_layout_that_llama_cpp_runs_is_the_same_model(change: Change, mixture: Path, tmp_path: Path) -> None:
    other, good = open_model(changed(mixture, tmp_path / "other.gguf", change)), open_gguf(mixture)
    ours, theirs = rows_of(other), rows_of(good)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert np.array_equal(ours[name], values), name
    assert {(t.name, t.role, t.layer) for t in other.tensors} == {(t.name, t.role, t.layer) for t in good.tensors}
    for tensor in other.tensors:  # in pieces, across the borders of experts
        pieces = [tensor.rows(start, min(start + 7, tensor.n_rows)) for start in range(0, tensor.n_rows, 7)]
        assert np.array_equal(np.concatenate(pieces).reshape(tensor.shape), theirs[tensor.name]), tensor.name
    assert {error.snr_db for error in weight_errors(other, good)} == {None}
    report = check_gguf(tmp_path / "other.gguf", good)
    assert (report.findings, {item.snr_db for item in report.comparisons}) == ((), {None})


def test_a_fused_file_quantizes_to_the_bytes_of_the_plain_one(mixture: Path, tmp_path: Path) -> None:
    change, made = both, {}
    for name, source in (("plain", mixture), ("fused", changed(mixture, tmp_path / "other.gguf", change))):
        write(plan(open_model(source), open_recipe("q4_k_m")), tmp_path / f"{name}.gguf")
        model = open_gguf(tmp_path / f"{name}.gguf")
        made[name] = {t.name: (t.dtype, t.source.stored(0, t.n_rows).tobytes()) for t in model.tensors}  # type: ignore[union-attr]
    assert made["fused"] == made["plain"]


def test_what_was_taken_apart_is_said(mixture: Path, tmp_path: Path) -> None:
    notes = open_model(changed(mixture, tmp_path / "other.gguf", both)).notes
    assert "5 tensors that another tool had fused: taken apart" in notes


def test_a_fused_tensor_of_another_size_is_no_fused_one(dense: Path, tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        QKV(parts)
        values, kind = parts.tensors["blk.3.attn_qkv.weight"]
        parts.tensors["blk.3.attn_qkv.weight"] = (values[:-1], kind)

    with pytest.raises(ArchitectureError, match=r"missing:\s+blk.3.attn_q.weight"):
        open_model(changed(dense, tmp_path / "other.gguf", change))


def fits_default_sections(parts: Parts) -> None:
    for key, number in {"rope.dimension_count": 64, "attention.key_length": 64, "attention.value_length": 64}.items():
        set_key(f"qwen35.{key}", "u32", number)(parts)
    del parts.metadata["qwen35.rope.dimension_sections"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_key("qwen35.rope.dimension_sections", "i32[]", [3, 3, 2]), [3, 3, 2, 0]),
        (set_key("qwen35.rope.dimension_sections", "u32[]", [8]), [8, 0, 0, 0]),
        (fits_default_sections, [11, 11, 10, 0]),
    ],
)
def test_short_rope_sections_are_made_good_and_said(
    change: Change, expected: list[int], dense: Path, tmp_path: Path
) -> None:
    model = open_model(changed(dense, tmp_path / "other.gguf", change))
    assert model.metadata["qwen35.rope.dimension_sections"] == Value("i32[]", expected)
    assert any("rope.dimension_sections" in note and str(expected) in note for note in model.notes)


def without(key: str) -> Change:
    return lambda parts: parts.metadata.pop(f"qwen35.{key}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("rope.dimension_sections"), "rope.dimension_sections: missing"),
        (set_key("qwen35.rope.dimension_sections", "i32[]", [0, 0, 0, 0]), r"\[0, 0, 0, 0\], expected four"),
        (set_key("qwen35.rope.dimension_sections", "i32[]", [3, 3, 2, 0, 0]), "expected four whole numbers"),
        (set_key("qwen35.rope.dimension_sections", "f32[]", [3.0, 3.0, 2.0, 0.0]), "expected four whole numbers"),
        (without("rope.freq_base"), "rope.freq_base: missing"),
        (set_key("qwen35.rope.freq_base", "f32", -1.0), "rope.freq_base: -1.0"),
        (without("rope.dimension_count"), "rope.dimension_count: missing"),
        (set_key("qwen35.rope.dimension_count", "u32", 15), "rope.dimension_count: 15, expected an even number"),
        (without("attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon: missing"),
        (set_key("qwen35.attention.layer_norm_rms_epsilon", "f32", 0.0), "layer_norm_rms_epsilon: 0.0"),
        (without("attention.value_length"), "attention.value_length: missing, attention.key_length is 64"),
        (set_key("qwen35.attention.recurrent_layers", "bool[]", [True]), "recurrent_layers: expected true or false"),
        (set_key("qwen35.full_attention_interval", "u32", 0), "full_attention_interval: 0, expected a positive"),
    ],
)
def test_metadata_that_no_runtime_loads_is_refused_before_it_is_copied(
    change: Change, message: str, dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArchitectureError, match=message):
        open_model(changed(dense, tmp_path / "other.gguf", change))


def tokens(change: Callable[[list[str]], list[str]]) -> Change:
    def apply(parts: Parts) -> None:
        listed = parts.metadata["tokenizer.ggml.tokens"].value
        parts.metadata["tokenizer.ggml.tokens"] = Value("str[]", change(listed))

    return apply


def no(key: str) -> Change:
    return lambda parts: parts.metadata.pop(f"tokenizer.ggml.{key}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no("model"), "model: missing, empty or of another type"),
        (no("pre"), "pre: missing, empty or of another type"),
        (no("tokens"), "tokens: missing, empty or of another type"),
        (no("merges"), "merges: missing, empty or of another type"),
        (set_key("tokenizer.ggml.merges", "i32[]", [1, 2]), "merges: missing, empty or of another type"),
        (set_key("tokenizer.ggml.model", "str", "llama"), "model: 'llama', this family has 'gpt2'"),
        (set_key("tokenizer.ggml.pre", "str", "nonsense"), "pre: 'nonsense', this family has 'qwen35' or 'qwen2'"),
        (tokens(lambda listed: listed[:-1]), r"tokens: \d+ for an embedding of \d+ rows"),
        (tokens(lambda listed: [*listed[:-1], listed[7]]), "tokens: 1 texts stand twice"),
        (set_key("tokenizer.ggml.token_type", "i32[]", [1, 2]), "token_type: expected a whole number for each"),
        (set_key("tokenizer.ggml.token_type", "f32[]", [1.0, 2.0]), "token_type: expected a whole number for each"),
        (set_key("tokenizer.ggml.eos_token_id", "str", "x"), "eos_token_id: x, no id of"),
        (set_key("tokenizer.ggml.padding_token_id", "u32", 10**6), "padding_token_id: 1000000, no id of"),
    ],
)
def test_a_vocabulary_that_no_runtime_loads_is_refused_before_it_is_copied(
    change: Change, message: str, dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArchitectureError, match=rf"  tokenizer\.ggml\.{message}"):
        open_model(changed(dense, tmp_path / "other.gguf", change))


def as_ollama(parts: Parts) -> None:
    set_key("qwen35.attention.head_count_kv", "u32[]", [0, 0, 0, 2])(parts)
    for name in [name for name in parts.tensors if name.endswith(".ssm_dt.bias")]:
        parts.tensors[name.removesuffix(".bias")] = parts.tensors.pop(name)
    parts.tensors["v.patch_embd.weight"] = (np.ones((8, 8), np.float32), "F32")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (as_ollama, "Ollama's own layout .*head_count_kv is an array.*ssm_dt has no .bias.*vision tower is inside"),
        (set_key("prism.hadamard.block_size", "u32", 1024), "folded by a Hadamard rotation .*PrismML"),
        (set_key("qwen35.output_gate_type", "str", "sigmoid"), "output gate is 'sigmoid', llama.cpp computes silu"),
    ],
)
def test_a_layout_that_llama_cpp_does_not_run_is_named(change: Change, name: str, dense: Path, tmp_path: Path) -> None:
    other = changed(dense, tmp_path / "other.gguf", change)
    with pytest.raises(ArchitectureError, match=name):
        open_model(other)
    assert "layout" in {finding.code for finding in check_gguf(other).findings}


@pytest.mark.parametrize(
    ("ggml_id", "name"),
    [
        (42, "Q2_0: a ternary type"),
        (142, "PQ2_0: .*PrismML.*Hadamard"),
        (143, "PTQ1_0: .*PrismML.*Hadamard"),
        (31, "Q4_0_4_4: rows interleaved"),
        (139, "one of ik_llama.cpp's own"),
        (9999, "GGML type 9999 is not supported"),
    ],
)
def test_a_type_that_is_not_read_is_named(ggml_id: int, name: str, dense: Path, tmp_path: Path) -> None:
    data, key = bytearray(dense.read_bytes()), b"blk.0.ffn_up.weight"
    at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", ggml_id)
    (tmp_path / "other.gguf").write_bytes(data)
    with pytest.raises(SourceError, match=f"types that are not read here(.|\n)*blk.0.ffn_up.weight: .*{name}"):
        open_gguf(tmp_path / "other.gguf")


@pytest.mark.parametrize("version", [2, 3])
def test_a_big_endian_file_is_named(version: int, tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", version, 0, 0))
    with pytest.raises(SourceError, match=r"a big-endian GGUF.*gguf-convert-endian big.gguf little"):
        open_gguf(path)


def test_a_matrix_of_the_fused_file_weighs_its_parts(mixture: Path, tmp_path: Path) -> None:
    model, recipe = open_model(mixture), open_recipe("q4_0")
    rng = np.random.default_rng(5)
    plain = {
        tensor.name: rng.random((*tensor.shape[:-2], tensor.n_cols)).astype(np.float32)
        for tensor in model.tensors
        if len(tensor.shape) > 1 and tensor.layer is not None and not tensor.keep_f32
    }
    for block in ("blk.0", "blk.1", "blk.2", "blk.3"):
        plain[f"{block}.ffn_up_exps.weight"] = plain[f"{block}.ffn_gate_exps.weight"]
    for part in ("k", "v"):
        plain[f"blk.3.attn_{part}.weight"] = plain["blk.3.attn_q.weight"]
    fused = {name: array for name, array in plain.items() if not re.search(r"ffn_(up|gate)_exps|attn_[qkv]\.", name)}
    fused |= {f"blk.{i}.ffn_gate_up_exps.weight": plain[f"blk.{i}.ffn_gate_exps.weight"] for i in range(4)}
    fused["blk.3.attn_qkv.weight"] = plain["blk.3.attn_q.weight"]
    for name, weights in (("plain", plain), ("fused", fused)):
        write(plan(model, recipe, Importance(weights, "m")), tmp_path / f"{name}.gguf")
    ours, theirs = (rows_of(open_gguf(tmp_path / f"{name}.gguf")) for name in ("fused", "plain"))
    assert all(np.array_equal(ours[name], values) for name, values in theirs.items())


def test_work_on_a_files_own_tensors_needs_them_apart(dense: Path, tmp_path: Path) -> None:
    other = changed(dense, tmp_path / "other.gguf", QKV)
    with pytest.raises(ArchitectureError, match=r"quantize \S+ --recipe from:(.|\n)*blk.3.attn_qkv.weight"):
        open_unfused(other)
    model = open_model(other)
    write(plan(model, open_recipe(f"from:{other}")), tmp_path / "apart.gguf")
    apart, good = open_unfused(tmp_path / "apart.gguf"), open_unfused(dense)
    assert {t.name: t.dtype for t in apart.tensors} == {t.name: t.dtype for t in good.tensors}
    assert all(np.array_equal(rows_of(apart)[name], values) for name, values in rows_of(good).items())
