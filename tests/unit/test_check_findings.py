"""Each kind of finding: metadata, tokenizer, structure, numbers, and the comparison with a source."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from check_maker import found, message, set_key
from checkpoint_maker import make_checkpoint, text_config, weights_for
from gguf_maker import Parts, changed, take_apart

from pocketquant import open_model
from pocketquant.check import ERROR, WARNING, check_gguf
from pocketquant.check.checking import check_header
from pocketquant.check.contents import contents_of_gguf
from pocketquant.errors import SourceError
from pocketquant.model import Value

# ---------------------------------------------------------------- metadata, tokenizer, structure


@pytest.mark.parametrize(
    ("key", "kind", "value", "code"),
    [
        ("qwen35.block_count", "u32", 3, "block-count"),
        ("qwen35.block_count", "u32", 6, "block-count"),
        ("qwen35.block_count", "str", "4", "key-value"),
        ("qwen35.context_length", "u32", 0, "key-value"),
        ("qwen35.rope.dimension_sections", "i32[]", [3, 3, 2], "rope-sections"),
        ("qwen35.rope.dimension_sections", "i32[]", [11, 11, 10, 0], "rope-sections"),
        ("qwen35.rope.freq_base", "f32", -1.0, "key-value"),
        ("qwen35.attention.layer_norm_rms_epsilon", "f32", 1.0, "key-value"),
        ("qwen35.attention.head_count_kv", "u32", 3, "heads"),
        ("qwen35.attention.value_length", "u32", 32, "heads"),
        ("qwen35.ssm.inner_size", "u32", 512, "heads"),
        ("qwen35.ssm.group_count", "u32", 3, "heads"),
        ("qwen35.attention.recurrent_layers", "bool[]", [True, True], "key-value"),
        ("tokenizer.ggml.eos_token_id", "u32", 320, "token-id"),
        ("tokenizer.ggml.add_bos_token", "bool", True, "add-bos"),
        ("tokenizer.ggml.tokens", "str[]", ["a"] * 319, "token-count"),
        ("tokenizer.ggml.tokens", "str[]", ["a", "a"] * 160, "token-twice"),
        ("tokenizer.ggml.model", "str", "llama", "tokenizer"),
    ],
)
def test_incoherent_metadata(key: str, kind: str, value: object, code: str, good: Path, tmp_path: Path) -> None:
    assert (code, key) in found(check_gguf(changed(good, tmp_path / "m.gguf", set_key(key, kind, value))))


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("qwen35.rope.dimension_sections", "key-missing"),
        ("qwen35.ssm.state_size", "key-missing"),
        ("qwen35.rope.freq_base", "key-missing"),
        ("tokenizer.ggml.merges", "tokenizer"),
        ("tokenizer.ggml.token_type", "tokenizer"),
        ("tokenizer.ggml.eos_token_id", "no-eos"),
    ],
)
def test_missing_keys(key: str, code: str, good: Path, tmp_path: Path) -> None:
    report = check_gguf(changed(good, tmp_path / "m.gguf", lambda parts: parts.metadata.pop(key)))
    assert (code, key) in found(report)


def test_missing_unknown_misshapen_and_mistyped_tensors(good: Path, tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        del parts.tensors["blk.2.ffn_up.weight"]
        parts.tensors["v.patch_embd.bias"] = (np.arange(8.0), "F32")
        parts.tensors["blk.3.attn_k.weight"] = (parts.tensors["blk.3.attn_k.weight"][0].T, "BF16")
        parts.tensors["blk.1.ssm_a"] = (parts.tensors["blk.1.ssm_a"][0], "F16")

    report = check_gguf(changed(good, tmp_path / "m.gguf", change))
    assert found(report) == {
        ("tensor-missing", "blk.2.ffn_up.weight"),
        ("tensor-unknown", "v.patch_embd.bias"),
        ("shape", "blk.3.attn_k.weight"),
        ("type", "blk.1.ssm_a"),
    }
    assert "belongs into an mmproj file" in message(report, "tensor-unknown")
    assert "transposed" in message(report, "shape")


def test_unknown_architectures_are_covered_in_part_and_said_so(good: Path, tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        parts.metadata["general.architecture"] = Value("str", "mamba")
        parts.tensors["blk.0.ffn_up.weight"][0][:] = np.nan

    report = check_gguf(changed(good, tmp_path / "m.gguf", change))
    assert found(report) == {("non-finite", "blk.0.ffn_up.weight")}
    assert any(
        "architecture 'mamba' is not known: tensor names, shapes and keys are not covered" in n for n in report.notes
    )


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: b"PK" + data, lambda data: data[:-4096]])
def test_unreadable_headers_are_errors(damage: Callable[[bytes], bytes], good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(damage(good.read_bytes()))
    with pytest.raises(SourceError):
        check_gguf(path)


def test_no_metadata_however_wrong_crashes_a_check(good: Path) -> None:
    contents = contents_of_gguf(good)
    odd = [
        Value("str", "?"),
        Value("u32", 0),
        Value("i64", -(1 << 62)),
        Value("u64", (1 << 64) - 1),
        Value("f32", float("nan")),
        Value("bool", True),
        Value("i32[]", []),
        Value("str[]", ["?", ""]),
        Value("f64[]", [1e300, float("inf")]),
    ]
    names = ("nextn_predict_layers", "full_attention_interval", "attention.recurrent_layers")
    keys = [*contents.metadata, "split.count", *(f"qwen35.{name}" for name in names)]
    refused = 0
    for key in keys:
        for value in odd:
            if key == "tokenizer.chat_template" and value.kind == "str":
                continue  # a template like another
            changed_one = replace(contents, metadata={**contents.metadata, key: value})
            refused += any(finding.severity == ERROR for finding in check_header(changed_one, []))
        without = {name: kept for name, kept in contents.metadata.items() if name != key}
        list(check_header(replace(contents, metadata=without), []))
    assert refused > 150


# ---------------------------------------------------------------- numbers


def test_zeros_holes_outliers_and_duplicates(good: Path, tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        tensors = parts.tensors
        tensors["blk.0.attn_qkv.weight"] = (np.zeros_like(tensors["blk.0.attn_qkv.weight"][0]), "BF16")
        hole = tensors["blk.1.ffn_up.weight"][0].copy()
        hole.reshape(-1)[5000:8000] = 0
        tensors["blk.1.ffn_up.weight"] = (hole, "BF16")
        outlier = tensors["blk.2.ffn_up.weight"][0].copy()
        outlier[9, 64:96] *= 16384
        tensors["blk.2.ffn_up.weight"] = (outlier, "Q8_0")
        tensors["blk.2.ffn_gate.weight"] = tensors["blk.0.ffn_gate.weight"]

    report = check_gguf(changed(good, tmp_path / "m.gguf", change))
    assert found(report) == {("all-zero", "blk.0.attn_qkv.weight")}
    assert found(report, WARNING) == {
        ("zero-run", "blk.1.ffn_up.weight"),
        ("outlier", "blk.2.ffn_up.weight"),
        ("duplicate", "blk.2.ffn_gate.weight"),
    }
    assert "row 9 reaches" in message(report, "outlier")
    assert "blk.0.ffn_gate.weight" in message(report, "duplicate")


# ---------------------------------------------------------------- against the source


def test_another_models_file_is_told_from_the_source(good: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "c", weights=weights_for(text_config(), seed=1))
    report = check_gguf(good, open_model(other))
    assert ("far-off", "blk.0.ffn_up.weight") in found(report)
    assert "other numbers altogether" in message(report, "far-off")


def test_metadata_that_is_not_the_sources(good: Path, realistic: Path, tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        parts.metadata["qwen35.rope.freq_base"] = Value("f32", 10000.0)
        tokens = list(parts.metadata["tokenizer.ggml.tokens"].value)
        tokens[100], tokens[101] = tokens[101], tokens[100]
        parts.metadata["tokenizer.ggml.tokens"] = Value("str[]", tokens)

    report = check_gguf(changed(good, tmp_path / "m.gguf", change), open_model(realistic))
    assert found(report) == {("differs", "qwen35.rope.freq_base"), ("differs", "tokenizer.ggml.tokens")}
    assert "differs first at 100" in next(f.message for f in report.findings if f.tensor.endswith("tokens"))


def test_one_norm_off_by_one(good: Path, realistic: Path, tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        parts.tensors["output_norm.weight"] = (parts.tensors["output_norm.weight"][0] - 1, "F32")

    report = check_gguf(changed(good, tmp_path / "m.gguf", change), open_model(realistic))
    assert found(report) == {("norm-centre", "output_norm.weight")}
    assert "1 was not added" in message(report, "norm-centre")


def test_the_report_is_json(good: Path, realistic: Path) -> None:
    report = check_gguf(good, open_model(realistic)).to_json()
    assert json.loads(json.dumps(report)) == report
    assert (report["schema"], report["errors"], report["warnings"]) == ("pocketquant.check/1", 0, 0)
    assert len(report["comparisons"]) == report["tensors"] == len(take_apart(good).tensors)
