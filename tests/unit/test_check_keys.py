"""`check --source`: every key in both directions, sidecars against their own part, and rows that are not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from check_maker import found, make_good_gguf, make_trained_checkpoint, message, set_key
from checkpoint_maker import make_checkpoint, mtp_weights_for, text_config, weights_for
from gguf_maker import Parts, changed
from vision_maker import make_vision_checkpoint

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.check import ERROR, WARNING, CheckReport, check_gguf, check_model
from pocketquant.cli.check import check_file_or_source
from pocketquant.convert.checkpoint import open_mtp
from pocketquant.convert.sources import open_counterpart
from pocketquant.convert.vision import open_vision
from pocketquant.errors import SourceError
from pocketquant.model import Model, Value

Change = Callable[[Parts], None]


def without(key: str) -> Change:
    return lambda parts: parts.metadata.pop(key) and None


def quiet(file: Path, source: Path) -> CheckReport:
    return check_file_or_source(str(file), str(source), lambda done, total: None)


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("change", "key", "severity"),
    [
        (set_key("tokenizer.ggml.eot_token_id", "u32", 5), "tokenizer.ggml.eot_token_id", ERROR),
        (set_key("tokenizer.ggml.eom_token_id", "u32", 5), "tokenizer.ggml.eom_token_id", ERROR),
        (set_key("tokenizer.ggml.bos_token_id", "u32", 5), "tokenizer.ggml.bos_token_id", ERROR),
        (set_key("tokenizer.ggml.add_eos_token", "bool", True), "tokenizer.ggml.add_eos_token", ERROR),
        (set_key("tokenizer.ggml.padding_token_id", "u32", 5), "tokenizer.ggml.padding_token_id", WARNING),
        (without("tokenizer.ggml.padding_token_id"), "tokenizer.ggml.padding_token_id", WARNING),
        (set_key("tokenizer.ggml.token_type", "i32[]", [1] * 320), "tokenizer.ggml.token_type", WARNING),
        (set_key("qwen35.rope.scaling.type", "str", "yarn"), "qwen35.rope.scaling.type", ERROR),
        (set_key("qwen35.attention.sliding_window", "u32", 64), "qwen35.attention.sliding_window", ERROR),
        (set_key("qwen35.something", "u32", 64), "qwen35.something", WARNING),
        (set_key("qwen35.context_length", "u32", 64), "qwen35.context_length", WARNING),
        (
            set_key("qwen35.attention.recurrent_layers", "bool[]", [True, False, True, False]),
            "qwen35.attention.recurrent_layers",
            ERROR,
        ),
        (set_key("tokenizer.chat_template.rag", "str", "x"), "tokenizer.chat_template.rag", WARNING),
        (without("tokenizer.chat_template"), "tokenizer.chat_template", WARNING),
        (set_key("general.sampling.temp", "f32", 9.0), "general.sampling.temp", WARNING),
    ],
)
def test_extra_eot_and_every_other_key_is_compared_both_ways(
    change: Change, key: str, severity: str, good: Path, realistic: Path, tmp_path: Path
) -> None:
    report = check_gguf(changed(good, tmp_path / "m.gguf", change), open_model(realistic))
    assert ("differs", key) in found(report, severity)
    other = ERROR if severity == WARNING else WARNING
    assert not {place for code, place in found(report, other) if code == "differs"}


def test_extra_eot_from_another_generation_config(good: Path, tmp_path: Path) -> None:
    """The case as it came: generation_config.json said 5 when the file was made, and is right in the source."""
    wrong = make_trained_checkpoint(tmp_path / "wrong")
    (wrong / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    made = make_good_gguf(wrong, tmp_path / "wrong.gguf")
    report = quiet(made, make_trained_checkpoint(tmp_path / "right"))
    assert ("differs", "tokenizer.ggml.eot_token_id") in found(report)
    assert "5; the source has none" in message(report, "differs")


def test_keys_the_source_has_and_the_file_lacks(good: Path, realistic: Path, tmp_path: Path) -> None:
    model = open_model(realistic)
    more = {"tokenizer.ggml.eot_token_id": Value("u32", 260), "qwen35.rope.scaling.factor": Value("f32", 4.0)}
    report = check_gguf(good, replace(model, metadata={**model.metadata, **more}))
    assert found(report) == {("differs", key) for key in more}
    assert "missing; the source has 260" in message(report, "differs")


def test_what_only_describes_is_a_note(good: Path, realistic: Path, tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        parts.metadata["general.name"] = Value("str", "Other")
        parts.metadata["general.author"] = Value("str", "Me")
        parts.metadata["quantize.imatrix.file"] = Value("str", "x")
        parts.metadata["mine.key"] = Value("u32", 3)

    report = check_gguf(changed(good, tmp_path / "m.gguf", change), open_model(realistic))
    assert report.findings == ()
    assert "these descriptions differ from the source's: general.name, general.author, mine.key" in report.notes


@pytest.mark.parametrize("key", ["full_attention_interval", "attention.recurrent_layers"])
def test_the_kinds_of_blocks_may_be_said_in_two_ways(key: str, good: Path, realistic: Path, tmp_path: Path) -> None:
    file = changed(good, tmp_path / "m.gguf", without(f"qwen35.{key}"))
    assert check_gguf(file, open_model(realistic)).findings == ()


# ---------------------------------------------------------------- sidecars


def test_an_mmproj_is_compared_with_the_tower_of_its_checkpoint(tmp_path: Path) -> None:
    source = make_vision_checkpoint(tmp_path / "c")
    tower = open_vision(source)
    assert tower is not None
    write(plan(tower, open_recipe("bf16")), tmp_path / "mmproj.gguf")
    report = quiet(tmp_path / "mmproj.gguf", source)
    assert (report.findings, len(report.comparisons)) == ((), len(tower.tensors))
    other = make_vision_checkpoint(tmp_path / "other")
    config = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**config, "image_mean": [0.1, 0.2, 0.3]}))
    assert found(quiet(tmp_path / "mmproj.gguf", other)) == {("differs", "clip.vision.image_mean")}


def test_an_mmproj_of_a_text_model_is_refused(tmp_path: Path, realistic: Path) -> None:
    tower = open_vision(make_vision_checkpoint(tmp_path / "c"))
    assert tower is not None
    write(plan(tower, open_recipe("bf16")), tmp_path / "mmproj.gguf")
    with pytest.raises(SourceError, match="has no vision tower"):
        open_counterpart(tmp_path / "mmproj.gguf", realistic)


@pytest.mark.parametrize("mode", ["sidecar", "embed"])
def test_a_prediction_block_is_compared_wherever_it_is(mode: str, tmp_path: Path) -> None:
    config = text_config()
    weights = {**weights_for(config), **mtp_weights_for(config)}
    for name in weights:
        if name.endswith("linear_attn.norm.weight"):
            weights[name] += 1
    source = make_checkpoint(tmp_path / "c", weights=weights, mtp_num_hidden_layers=1)
    model: Model | None = open_mtp(source) if mode == "sidecar" else open_model(source, mtp="embed")
    assert model is not None
    write(plan(model, open_recipe("bf16")), tmp_path / "m.gguf")
    report = quiet(tmp_path / "m.gguf", source)
    assert (found(report), len(report.comparisons)) == (set(), len(model.tensors))
    assert not any("not compared" in note for note in report.notes)
    plain = make_checkpoint(tmp_path / "plain")
    if mode == "sidecar":
        with pytest.raises(SourceError, match="has no multi-token-prediction block"):
            quiet(tmp_path / "m.gguf", plain)


# ---------------------------------------------------------------- rows and norms


def zero_rows(name: str, rows: slice) -> Change:
    def change(parts: Parts) -> None:
        values, kind = parts.tensors[name]
        values = values.copy()
        values[rows] = 0
        parts.tensors[name] = (values, kind)

    return change


def test_rows_that_are_all_zero_are_found(good: Path, realistic: Path, tmp_path: Path) -> None:
    bad = changed(good, tmp_path / "m.gguf", zero_rows("blk.1.ffn_up.weight", slice(7, 9)))
    assert found(check_gguf(bad), WARNING) == {("zero-rows", "blk.1.ffn_up.weight")}
    report = check_gguf(bad, open_model(realistic))
    assert found(report) >= {("lost-rows", "blk.1.ffn_up.weight")}
    assert "2 rows are all zero, the first 7, and not so in the source" in message(report, "lost-rows")


def test_a_single_lost_row_shows_in_a_four_bit_file(realistic: Path, tmp_path: Path) -> None:
    """One row of 512 is 27 decibels, which Q4_0 is far from keeping."""
    write(plan(open_model(realistic), open_recipe("q4_0")), tmp_path / "q4.gguf")
    bad = changed(tmp_path / "q4.gguf", tmp_path / "m.gguf", zero_rows("blk.1.ffn_up.weight", slice(7, 8)))
    assert found(check_gguf(bad, open_model(realistic))) == {("lost-rows", "blk.1.ffn_up.weight")}


def test_embedding_rows_without_a_token_may_be_zero(good: Path, tmp_path: Path) -> None:
    padding = changed(good, tmp_path / "padding.gguf", zero_rows("token_embd.weight", slice(262, 320)))
    assert check_gguf(padding).findings == ()
    token = changed(good, tmp_path / "token.gguf", zero_rows("token_embd.weight", slice(261, 320)))
    report = check_gguf(token)
    assert found(report, WARNING) == {("zero-rows", "token_embd.weight")}
    assert "1 rows are all zero, the first 261" in message(report, "zero-rows")


def test_rows_that_are_zero_in_the_source_too_are_no_loss(tmp_path: Path) -> None:
    weights = weights_for(text_config())
    weights["model.layers.1.mlp.up_proj.weight"][3] = 0
    for name in weights:
        if name.endswith("linear_attn.norm.weight"):
            weights[name] += 1
    source = make_checkpoint(tmp_path / "c", weights=weights)
    report = check_gguf(make_good_gguf(source, tmp_path / "m.gguf"), open_model(source))
    assert (found(report), found(report, WARNING)) == (set(), {("zero-rows", "blk.1.ffn_up.weight")})


def test_norms_that_are_zero_in_part_are_found(good: Path, tmp_path: Path) -> None:
    bad = changed(good, tmp_path / "m.gguf", zero_rows("blk.2.attn_norm.weight", slice(0, 64)))
    report = check_gguf(bad)
    assert ("zero-norm", "blk.2.attn_norm.weight") in found(report, WARNING)
    assert "64 of 256 numbers are exactly zero" in message(report, "zero-norm")


def test_a_norm_that_is_zero_in_the_checkpoint_is_found(tmp_path: Path) -> None:
    weights = weights_for(text_config())
    for name in weights:
        if name.endswith("linear_attn.norm.weight"):
            weights[name] += 1
    weights["model.layers.2.input_layernorm.weight"] = np.zeros(256, np.float32)
    report = check_model(open_model(make_checkpoint(tmp_path / "c", weights=weights)))
    assert found(report, WARNING) == {("zero-norm", "blk.2.attn_norm.weight")}
    assert "3 other blocks' are not" in message(report, "zero-norm")
