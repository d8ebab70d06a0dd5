"""What a check finds in files as other tools leave them, and that it finds nothing in ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from check_maker import found, message, scale, set_key
from checkpoint_maker import make_checkpoint, moe_config, text_config, weights_for
from gguf_maker import Parts, changed, put_together
from vision_maker import make_vision_checkpoint

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.architectures.qwen35 import QWEN35
from pocketquant.check import ERROR, WARNING, check_gguf, check_model
from pocketquant.check.contents import CHUNK_WEIGHTS, Entry
from pocketquant.cli.check import check_file_or_source
from pocketquant.convert.vision import open_vision
from pocketquant.errors import SourceError
from pocketquant.formats import FORMATS
from pocketquant.model import Value

# ---------------------------------------------------------------- nothing to find


@pytest.mark.parametrize("what", ["checkpoint", "file"])
@pytest.mark.parametrize("fate", ["gone", "shorter", "unreadable"])
def test_what_cannot_be_read_any_more_is_no_finding(what: str, fate: str, realistic: Path, tmp_path: Path) -> None:
    """The comparison cannot be made, so nothing is said of the file: an error with exit code 2."""
    source = Path(shutil.copytree(realistic, tmp_path / "c"))
    model, out = open_model(source), tmp_path / "m.gguf"
    write(plan(model, open_recipe("q8_0")), out)
    victim = out if what == "file" else source / "model.safetensors"
    n_tensors = len(model.tensors)

    def lose(done: int, _: int) -> None:
        if done != n_tensors + 5:
            return
        victim.rename(tmp_path / "moved")
        if fate == "shorter":
            victim.write_bytes((tmp_path / "moved").read_bytes()[:-4096])
        elif fate == "unreadable":
            victim.mkdir()

    with pytest.raises(SourceError, match=victim.name):
        check_gguf(out, model, progress=lose)


@pytest.mark.parametrize("recipe", ["f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "pocket_4bit"])
def test_our_files_are_clean(recipe: str, realistic: Path, tmp_path: Path) -> None:
    model = open_model(realistic)
    write(plan(model, open_recipe(recipe)), tmp_path / "m.gguf")
    report = check_gguf(tmp_path / "m.gguf", model)
    assert report.findings == ()
    assert len(report.comparisons) == len(model.tensors)
    assert all(item.snr_db is None or item.snr_db > item.limit_db + 3 for item in report.comparisons)


def test_mixtures_of_experts_are_clean(tmp_path: Path) -> None:
    config = moe_config()
    weights = weights_for(config)
    for name in weights:
        if name.endswith("linear_attn.norm.weight"):
            weights[name] += 1
    model = open_model(make_checkpoint(tmp_path / "c", weights=weights, **config))
    write(plan(model, open_recipe("q4_k_m")), tmp_path / "m.gguf")
    report = check_gguf(tmp_path / "m.gguf", model)
    assert (report.findings, len(report.comparisons)) == ((), len(model.tensors))


def test_vision_towers_are_clean_and_their_tensors_known(tmp_path: Path) -> None:
    model = open_vision(make_vision_checkpoint(tmp_path / "c"))
    good = tmp_path / "mmproj.gguf"
    write(plan(model, open_recipe("bf16")), good)
    report = check_gguf(good, model)
    assert (report.findings, len(report.comparisons)) == ((), len(model.tensors))

    def change(parts: Parts) -> None:
        del parts.tensors["v.blk.1.attn_qkv.bias"]
        parts.tensors["mm.0.weight"] = (parts.tensors["mm.0.weight"][0][:-1], "BF16")

    report = check_gguf(changed(good, tmp_path / "m.gguf", change))
    assert found(report) == {("tensor-missing", "v.blk.1.attn_qkv.bias"), ("shape", "mm.0.weight")}


def test_a_good_checkpoint_is_clean(realistic: Path) -> None:
    assert check_model(open_model(realistic)).findings == ()


def test_the_embedded_model_is_clean(demo_gguf: Callable[[str], Path]) -> None:
    report = check_gguf(demo_gguf("q8_0"))
    assert report.findings == ()
    assert any("with an image: refused" in note for note in report.notes)


def test_limits_leave_room_for_heavy_tails_and_importance() -> None:
    rng = np.random.default_rng(5)
    for name, limit in ((item.name, item.snr_db) for item in FORMATS.values() if item.written and item.name != "F32"):
        for rows in (rng.standard_normal((16, 1024)), rng.standard_t(2, (16, 1024))):
            for importance in (None, np.exp(1.5 * rng.standard_normal(1024)).astype(np.float32)):
                values = (rows * 0.02).astype(np.float32)
                back = FORMATS[name].decode(FORMATS[name].encode(values, importance), 1024)
                lost = np.square(values - back, dtype=np.float64).sum()
                assert 10 * np.log10(np.square(values, dtype=np.float64).sum() / lost) > limit, name


# ---------------------------------------------------------------- what breaks for users today


def with_mtp_declared(parts: Parts) -> None:
    set_key("qwen35.nextn_predict_layers", "u32", 1)(parts)
    set_key("qwen35.block_count", "u32", 5)(parts)
    set_key("qwen35.attention.recurrent_layers", "bool[]", [True, True, True, False, False])(parts)


def with_mtp_block(parts: Parts) -> None:
    with_mtp_declared(parts)
    rng = np.random.default_rng(3)
    for name in list(parts.tensors):
        if name.startswith("blk.3."):
            values = parts.tensors[name][0]
            mtp = values + rng.standard_normal(values.shape) * 0.01
            parts.tensors[name.replace("blk.3.", "blk.4.")] = (mtp, "F32" if values.ndim == 1 else "Q4_0")
    for name, shape in (("eh_proj", (256, 512)), ("enorm", (256,)), ("hnorm", (256,)), ("shared_head_norm", (256,))):
        values = 1 + 0.1 * rng.standard_normal(shape)
        parts.tensors[f"blk.4.nextn.{name}.weight"] = (values, "F32" if len(shape) == 1 else "BF16")


def test_breaks_today_01_mtp_declared_but_absent(good: Path, tmp_path: Path) -> None:
    report = check_gguf(changed(good, tmp_path / "m.gguf", with_mtp_declared))
    assert found(report) == {("mtp-absent", "qwen35.nextn_predict_layers")}
    assert "blk.4.attn_norm.weight" in message(report, "mtp-absent")

    def half(parts: Parts) -> None:
        with_mtp_block(parts)
        del parts.tensors["blk.4.attn_norm.weight"]

    assert found(check_gguf(changed(good, tmp_path / "h.gguf", half))) == {("tensor-missing", "blk.4.attn_norm.weight")}


def test_breaks_today_02_mtp_inside_and_too_coarse(good: Path, tmp_path: Path) -> None:
    report = check_gguf(changed(good, tmp_path / "m.gguf", with_mtp_block))
    assert found(report) == set()
    warnings = found(report, WARNING)
    assert ("mtp-inside", "qwen35.nextn_predict_layers") in warnings
    coarse = {tensor for code, tensor in warnings if code == "mtp-coarse"}
    assert coarse == {f"blk.4.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "attn_output")} | {
        f"blk.4.ffn_{name}.weight" for name in ("gate", "up", "down")
    }

    def undeclared(parts: Parts) -> None:
        with_mtp_block(parts)
        del parts.metadata["qwen35.nextn_predict_layers"]

    assert ("mtp-undeclared", "qwen35.nextn_predict_layers") in found(
        check_gguf(changed(good, tmp_path / "u.gguf", undeclared))
    )


def test_an_mtp_sidecar_needs_no_trunk(good: Path, tmp_path: Path) -> None:
    def sidecar(parts: Parts) -> None:
        with_mtp_block(parts)
        for name in [name for name in parts.tensors if name.startswith("blk.") and not name.startswith("blk.4.")]:
            del parts.tensors[name]

    assert found(check_gguf(changed(good, tmp_path / "m.gguf", sidecar))) == set()


def test_breaks_today_03_empty_mmproj(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": Value("str", "clip"),
        "clip.has_vision_encoder": Value("bool", True),
        "clip.projector_type": Value("str", "qwen3vl_merger"),
        "clip.vision.block_count": Value("u32", 24),
    }
    path = put_together(tmp_path / "mmproj.gguf", metadata, {})
    report = check_gguf(path)
    assert found(report) == {("mmproj-empty", "")}
    assert "model.language_model.visual." in message(report, "mmproj-empty")


def test_breaks_today_04_mlx_norms_twice_and_conv_transposed(good: Path, tmp_path: Path) -> None:
    def mlx(parts: Parts) -> None:
        for name, (values, kind) in parts.tensors.items():
            if "norm" in name and "ssm" not in name:
                parts.tensors[name] = (values + 1, kind)
            elif "conv1d" in name:
                parts.tensors[name] = (values.T, kind)

    report = check_gguf(changed(good, tmp_path / "m.gguf", mlx))
    names = {f"{name}.weight" for name in ("attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm")}
    convs = {("shape", f"blk.{layer}.ssm_conv1d.weight") for layer in range(3)}
    assert found(report) == {("norm-centre", name) for name in names} | convs
    assert "1 was added twice" in message(report, "norm-centre")
    assert "MLX" in message(report, "shape")


def test_norms_without_one_are_found(good: Path, tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        for name, (values, kind) in parts.tensors.items():
            if name.endswith("attn_q_norm.weight"):
                parts.tensors[name] = (values - 1, kind)

    report = check_gguf(changed(good, tmp_path / "m.gguf", change))
    assert found(report) == {("norm-centre", "attn_q_norm.weight")}
    assert "1 was not added" in message(report, "norm-centre")


@pytest.mark.parametrize("pre", ["default", "llama-bpe", "qwen2", None])
def test_breaks_today_05_guessed_pre_tokenizer(pre: str | None, good: Path, realistic: Path, tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        parts.metadata["tokenizer.ggml.pre"] = Value("str", pre)
        if pre is None:
            del parts.metadata["tokenizer.ggml.pre"]

    path = changed(good, tmp_path / "m.gguf", change)
    severity = WARNING if pre == "qwen2" else ERROR
    assert found(check_gguf(path), severity) == {("pre-tokenizer", "tokenizer.ggml.pre")}
    assert ("differs", "tokenizer.ggml.pre") in found(check_gguf(path, open_model(realistic)))


def test_breaks_today_06_bitsandbytes_leftovers(good: Path, tmp_path: Path) -> None:
    weights = weights_for(text_config())
    weights["model.layers.0.mlp.up_proj.weight.absmax"] = np.ones(64, np.float32)
    weights["model.layers.0.mlp.up_proj.weight"] = np.ones((65536, 1), np.float32)
    report = check_file_or_source(str(make_checkpoint(tmp_path / "c", weights=weights)), None, lambda done, total: None)
    assert found(report) == {("refused", "")}
    assert "up_proj.weight.absmax" in message(report, "refused")

    def leftover(parts: Parts) -> None:
        parts.tensors["blk.0.ffn_up.weight.SCB"] = (np.arange(64.0), "F32")

    report = check_gguf(changed(good, tmp_path / "m.gguf", leftover))
    assert found(report) == {("tensor-unknown", "blk.0.ffn_up.weight.SCB")}
    assert "leftover" in message(report, "tensor-unknown")


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_breaks_today_07_tied_head_saved_again(kind: str, good: Path, tmp_path: Path) -> None:
    def duplicate(parts: Parts) -> None:
        parts.tensors["output.weight"] = (parts.tensors["token_embd.weight"][0], kind)

    report = check_gguf(changed(good, tmp_path / "m.gguf", duplicate))
    assert (found(report), found(report, WARNING)) == (set(), {("duplicate-head", "output.weight")})

    def own_head(parts: Parts) -> None:
        parts.tensors["output.weight"] = (parts.tensors["token_embd.weight"][0][::-1], kind)

    assert check_gguf(changed(good, tmp_path / "o.gguf", own_head)).findings == ()


def test_breaks_today_08_adapter_merged_in_the_wrong_head_order(good: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    weights = weights_for(text_config())
    names = {"in_proj_qkv": "attn_qkv", "in_proj_z": "attn_gate", "out_proj": "ssm_out"}
    deltas = {}
    for source, target in names.items():
        shape = weights[f"model.layers.1.linear_attn.{source}.weight"].shape
        delta = rng.standard_normal((shape[0], 4)) @ rng.standard_normal((4, shape[1])) * 0.003
        weights[f"model.layers.1.linear_attn.{source}.weight"] += delta.astype(np.float32)
        deltas[f"blk.1.{target}.weight"] = delta
    for name in weights:
        if name.endswith("linear_attn.norm.weight"):
            weights[name] += 1
    merged = open_model(make_checkpoint(tmp_path / "merged", weights=weights))

    def merge_grouped(parts: Parts) -> None:
        for name, delta in deltas.items():
            values, kind = parts.tensors[name]
            parts.tensors[name] = (values + delta, kind)

    report = check_gguf(changed(good, tmp_path / "m.gguf", merge_grouped), merged)
    assert found(report) == {("head-order", name) for name in deltas}
    assert "adapter" in message(report, "head-order")


@pytest.mark.parametrize("kind", ["BF16", "Q4_0"])
@pytest.mark.parametrize("twice", [False, True])
def test_value_heads_left_grouped_or_tiled_twice(
    kind: str, twice: bool, good: Path, realistic: Path, tmp_path: Path
) -> None:
    if twice:  # four heads in two groups come back after two rounds, so this needs more of them
        realistic = make_checkpoint(tmp_path / "c", linear_num_value_heads=8)
        good = tmp_path / "g.gguf"
        write(plan(open_model(realistic), open_recipe("bf16")), good)
    model = open_model(realistic)
    rules = {rule.target: rule for rule in QWEN35.tensors if rule.rows or rule.cols}

    def reorder(parts: Parts) -> None:
        for target, rule in rules.items():
            order = (rule.rows or rule.cols)(model.sizes)  # type: ignore[misc]
            values, stored = parts.tensors[f"blk.2.{target}"]
            axis = 0 if rule.rows else 1
            values = np.take(values, order if twice else np.argsort(order), axis)
            parts.tensors[f"blk.2.{target}"] = (values, kind if stored == "BF16" else stored)

    report = check_gguf(changed(good, tmp_path / "m.gguf", reorder), model)
    assert {item for item in found(report) if item[0] != "norm-centre"} == {
        ("head-order", f"blk.2.{target}") for target in rules
    }
    assert ("twice" if twice else "grouped by key head") in message(report, "head-order")


def test_breaks_today_09_scale_of_a_quantized_checkpoint_left_out(good: Path, realistic: Path, tmp_path: Path) -> None:
    path = changed(good, tmp_path / "m.gguf", scale("blk.1.ffn_up.weight", 448.0))
    assert check_gguf(path).findings == ()
    report = check_gguf(path, open_model(realistic))
    assert found(report) == {("far-off", "blk.1.ffn_up.weight")}
    assert "every number is 448 times the source's" in message(report, "far-off")

    def leftover(parts: Parts) -> None:
        parts.tensors["blk.1.ffn_up.weight_scale"] = (np.arange(1.0, 513.0), "F32")

    assert found(check_gguf(changed(good, tmp_path / "l.gguf", leftover))) == {
        ("tensor-unknown", "blk.1.ffn_up.weight_scale")
    }


def test_breaks_today_10_memory_does_not_grow_with_a_tensor(good: Path) -> None:
    asked: list[int] = []

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(stop - start)
        return np.zeros((stop - start, 4), np.uint8), np.ones((stop - start, 2560), np.float32)

    entry = Entry("token_embd.weight", (248320, 2560), "Q8_0", 0, read)
    for chunk in entry.row_chunks():
        entry.read(*chunk) if chunk[0] < 4096 else None
    assert max(asked) * 2560 <= CHUNK_WEIGHTS
    assert sum(stop - start for start, stop in entry.row_chunks()) == 248320


def test_breaks_today_11_broken_chat_template(good: Path, tmp_path: Path) -> None:
    path = changed(good, tmp_path / "m.gguf", set_key("tokenizer.chat_template", "str", "hello\n{% if %}"))
    report = check_gguf(path)
    assert found(report) == {("chat-template", "tokenizer.chat_template")}
    assert "line 2: syntax error" in message(report, "chat-template")
    own = "{{ messages[-1].content }}{% if tools %}\n{{ tools.a.b }}{% endif %}"
    report = check_gguf(changed(good, tmp_path / "t.gguf", set_key("tokenizer.chat_template", "str", own)))
    assert (found(report), found(report, WARNING)) == (set(), {("chat-template", "tokenizer.chat_template")})
    assert "line 2, with tools" in message(report, "chat-template")


def test_breaks_today_12_beyond_the_range_of_f16(good: Path, tmp_path: Path) -> None:
    def overflow(parts: Parts) -> None:
        values = parts.tensors["blk.0.ffn_down.weight"][0].copy()
        values[17, 3] = 70000.0
        parts.tensors["blk.0.ffn_down.weight"] = (values, "F16")
        cut = parts.tensors["blk.1.ffn_down.weight"][0].copy()
        cut[5, 5] = 65504.0
        parts.tensors["blk.1.ffn_down.weight"] = (cut, "F16")

    report = check_gguf(changed(good, tmp_path / "m.gguf", overflow))
    assert found(report) == {("non-finite", "blk.0.ffn_down.weight")}
    assert "in row 17" in message(report, "non-finite")
    assert ("saturated", "blk.1.ffn_down.weight") in found(report, WARNING)


def test_breaks_today_12_non_finite_checkpoint(tmp_path: Path) -> None:
    weights = weights_for(text_config())
    weights["model.layers.1.mlp.down_proj.weight"][17, 3] = np.nan
    report = check_model(open_model(make_checkpoint(tmp_path / "c", weights=weights)))
    assert found(report) == {("unreadable", "blk.1.ffn_down.weight")}


def test_breaks_today_13_file_type_that_the_weights_do_not_have(good: Path, tmp_path: Path) -> None:
    path = changed(good, tmp_path / "m.gguf", set_key("general.file_type", "u32", 15))
    report = check_gguf(path)
    assert (found(report), found(report, WARNING)) == (set(), {("file-type", "general.file_type")})
    assert "says Q4_K, which holds 0 % of the weights; most of them are BF16" in message(report, "file-type")
