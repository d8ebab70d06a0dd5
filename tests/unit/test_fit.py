"""`fit` against what llama.cpp allocates, and what it says of devices, sources and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_maker import make_checkpoint, mtp_weights_for, text_config, weights_for
from llama_memory import MIB, Loaded, cpu_kind, hollow_gguf, loaded
from typer.testing import CliRunner
from vision_maker import make_vision_checkpoint

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.cli.app import app
from pocketquant.demo import checkpoint_dir
from pocketquant.errors import ArchitectureError, RecipeError
from pocketquant.fit import (
    Part,
    Settings,
    Weights,
    device_named,
    devices,
    fit,
    held,
    memory_parts,
    tower_of,
    weights_of,
)
from pocketquant.fit.vision import vision_buffer_bytes
from pocketquant.formats import FORMATS
from pocketquant.quant import Choice
from pocketquant.release.outputs import Opening, plan_outputs

ROUNDING = 0.0051 * MIB
"""llama.cpp logs hundredths of a MiB."""
MEMBERS = {
    "dense": {},
    "untied": {"tie_word_embeddings": False, "linear_num_value_heads": 8, "num_key_value_heads": 1},
    "experts": {"num_experts": 6},
    "wide experts": {"num_experts": 16, "num_experts_per_tok": 4, "hidden_size": 512, "vocab_size": 1024},
    "two attention": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    "deep": {"num_hidden_layers": 8, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2},
}
SETTINGS = [
    Settings(context, cache_type_k=kind, cache_type_v=kind if flash else "f16", flash_attention=flash, outputs=outputs)
    for context, outputs in ((512, 512), (512, 1), (3000, 1), (8192, 1))
    for flash in (True, False)
    for kind in ("f16", "q8_0")
] + [
    Settings(8192, ubatch=64, outputs=64),
    Settings(2048, sequences=3, outputs=3, ubatch=100),
    Settings(4096, draft=3),
    Settings(2048, draft=1, sequences=2, outputs=2, flash_attention=False),
]


def assert_same(weights: Weights, runtime: Loaded, settings: Settings) -> None:
    """KV cache and state within 2 %, the compute buffer within 10 %: in truth, all to the last digit that is logged."""
    parts = {part.name: part.nbytes for part in memory_parts(weights, settings, "none")}
    measured = runtime.measure(settings)
    names = {"KV": "KV cache", "RS": "DeltaNet state", "compute": "compute buffer"}
    for key, name in names.items():
        assert parts.get(name, 0) == pytest.approx(measured[key], rel=1e-4, abs=ROUNDING), (name, settings)


@pytest.mark.parametrize("member", MEMBERS)
def test_buffers_are_those_that_llama_allocates(member: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", **MEMBERS[member])
    planned = plan(open_model(source), open_recipe("q8_0"))
    file = hollow_gguf(tmp_path / "hollow.gguf", planned)
    weights = weights_of(file)
    with loaded(file) as runtime:
        for settings in SETTINGS:
            assert_same(weights, runtime, settings)


@pytest.mark.parametrize("recipe", ["pocket_4bit", "q4_0", "q4_k_m", "iq4_nl", "bf16"])
def test_weights_are_those_that_llama_maps_and_packs(recipe: str, tmp_path: Path) -> None:
    for name, source in (("demo", checkpoint_dir()), ("experts", make_checkpoint(tmp_path / "s", num_experts=6))):
        file = tmp_path / f"{name}.gguf"
        write(plan(open_model(source), open_recipe(recipe)), file)
        weights = weights_of(file)
        with loaded(file, weights=True) as runtime:
            assert runtime.model_bytes == {"CPU_Mapped": pytest.approx(held(weights).mapped, abs=ROUNDING)}
        with loaded(file, weights=True, repack=True) as runtime:
            kind = cpu_kind(runtime.library)
            if kind == "amx":
                continue
            kept = held(weights, kind)
            assert runtime.model_bytes.get("CPU_Mapped", 0) == pytest.approx(kept.mapped, abs=ROUNDING)
            assert runtime.model_bytes.get("CPU_REPACK", 0) == pytest.approx(kept.repacked, abs=ROUNDING)
        for settings in SETTINGS[::5]:
            with loaded(file, weights=True) as runtime:  # weights that are there change nothing
                assert_same(weights, runtime, settings)


@pytest.fixture
def with_mtp(tmp_path: Path) -> Path:
    config = text_config(mtp_num_hidden_layers=1)
    weights = weights_for(config) | mtp_weights_for(config)
    return make_checkpoint(tmp_path / "mtp", weights=weights, mtp_num_hidden_layers=1)


DRAFTING = [
    Settings(4096, draft=2),
    Settings(512, draft=1, flash_attention=False),
    Settings(4096, draft=1, cache_type_k="q8_0", cache_type_v="q8_0"),
]


def test_drafting_takes_what_llama_allocates(with_mtp: Path, tmp_path: Path) -> None:
    parts = Opening().open(str(with_mtp))
    plans = {o.kind: o.plan for o in plan_outputs(parts, tmp_path / "m.gguf", Choice(open_recipe("q8_0")))}
    model, block = weights_of(plans["model"], parts.model), weights_of(hollow_gguf(tmp_path / "b.gguf", plans["mtp"]))
    with loaded(tmp_path / "b.gguf", has_mtp=True) as runtime:
        for settings in DRAFTING:
            assert_drafts(memory_parts(model, settings, "none", mtp=block), runtime, settings)
    found = {part.name: part.nbytes for part in memory_parts(model, DRAFTING[0], "none", mtp=block)}
    assert found["MTP weights"] == sum(item.nbytes for item in plans["mtp"].tensors)


def test_a_block_in_the_models_file_is_counted_where_one_drafts(with_mtp: Path, tmp_path: Path) -> None:
    model = open_model(with_mtp, mtp="embed")
    planned = plan(model, open_recipe("q8_0"))
    file = hollow_gguf(tmp_path / "m.gguf", planned)
    weights = weights_of(file)
    with loaded(file) as runtime:
        assert_same(weights, runtime, Settings(4096))
    with loaded(file, has_mtp=True) as runtime:
        assert_same(weights, runtime, DRAFTING[0])
        for settings in DRAFTING:
            assert_drafts(memory_parts(weights, settings, "none"), runtime, settings)
    names = {part.name for part in memory_parts(weights, Settings(), "none")}
    assert not any("MTP" in name for name in names)
    block = [part.nbytes for part in memory_parts(weights, DRAFTING[0], "none") if part.name == "MTP weights"]
    assert block == [sum(item.nbytes for item in planned.tensors if item.tensor.layer == 4)]


def assert_drafts(parts: tuple[Part, ...], runtime: Loaded, settings: Settings) -> None:
    found = {part.name: part.nbytes for part in parts}
    measured = runtime.measure(replace(settings, draft=0), drafts=True)
    assert measured["RS"] == 0
    assert found["MTP KV cache"] == pytest.approx(measured["KV"], rel=1e-4, abs=ROUNDING)
    assert found["MTP compute buffer"] == pytest.approx(measured["compute"], rel=1e-4, abs=ROUNDING)


def test_a_vision_tower_takes_what_llama_allocates(tmp_path: Path) -> None:
    parts = Opening().open(str(make_vision_checkpoint(tmp_path / "vision")))
    for recipe in ("q8_0", "bf16"):
        outputs = plan_outputs(parts, tmp_path / "m.gguf", Choice(open_recipe(recipe)))
        plans = {output.kind: output.plan for output in outputs}
        model, mmproj = (hollow_gguf(tmp_path / f"{kind}.gguf", plans[kind]) for kind in ("model", "mmproj"))
        tower = tower_of(mmproj)
        assert tower == tower_of(plans["mmproj"])
        assert tower.nbytes == sum(item.nbytes for item in plans["mmproj"].tensors)
        with loaded(model, weights=True) as runtime:
            for flash_attention in (True, False):
                buffer = vision_buffer_bytes(tower, flash_attention=flash_attention)
                measured = runtime.tower_buffer(mmproj, flash_attention=flash_attention)
                assert buffer == pytest.approx(measured, rel=1e-4, abs=ROUNDING)
    with pytest.raises(ArchitectureError, match="no vision tower"):
        tower_of(model)


def test_a_plan_says_what_its_file_says(tmp_path: Path) -> None:
    model = open_model(checkpoint_dir())
    planned = plan(model, open_recipe("pocket_4bit"))
    write(planned, tmp_path / "a.gguf")
    from_plan, from_file = weights_of(planned, model), weights_of(tmp_path / "a.gguf")
    assert [replace(w, offset=0) for w in from_plan.weights] == [replace(w, offset=0) for w in from_file.weights]
    assert from_plan.file_bytes == from_file.file_bytes == (tmp_path / "a.gguf").stat().st_size
    assert (from_plan.kinds, from_plan.n_tokens) == (from_file.kinds, from_file.n_tokens)
    for cpu in ("none", "arm"):
        assert memory_parts(from_plan, Settings(), cpu) == memory_parts(from_file, Settings(), cpu)


@pytest.fixture
def demo() -> Weights:
    model = open_model(checkpoint_dir())
    return weights_of(plan(model, open_recipe("pocket_4bit")), model)


def test_the_longest_context_is_the_longest(demo: Weights) -> None:
    total = fit(demo, Settings(2048), limit=1 << 30).total
    for limit in (total - 1, total, total + 1, total * 2):
        longest = fit(demo, Settings(256), limit=limit).longest_context
        assert fit(demo, Settings(max(longest, 1)), limit=limit).fits == (longest > 0)
        if longest < demo.sizes["n_ctx"]:
            assert not fit(demo, Settings(longest + 256), limit=limit).fits
    assert fit(demo, Settings(256), limit=total).longest_context >= 2048
    assert fit(demo, Settings(256), limit=total - 1).longest_context < 2048
    assert fit(demo, Settings(256), limit=1000).longest_context == 0


def test_changes_make_it_fit(demo: Weights) -> None:
    wide = Settings(8192, outputs=512, flash_attention=False)
    needed = fit(demo, Settings(4096, ubatch=128, cache_type_k="q8_0", cache_type_v="q8_0"), limit=1 << 40).total
    found = fit(demo, wide, limit=needed)
    assert not found.fits
    assert found.changes[-1].startswith("--context 4096")
    assert found.changes[-1].endswith("which fits")
    tight = fit(demo, wide, limit=needed - 100_000)
    assert "--target-size" in tight.changes[-1]
    budget = int(tight.changes[-1].rsplit(" ", 1)[1].strip("`"))
    assert budget == sum(weight.nbytes for weight in demo.trunk) - 100_000
    assert fit(demo, wide, limit=1000).changes[-1].startswith("a smaller model")


def test_every_device_is_described_with_a_source() -> None:
    assert len(devices()) >= 12
    for name, device in devices().items():
        assert device.title
        assert 1e9 < device.memory.value < 20e9, name
        for figure in (device.memory, device.bandwidth):
            assert figure is None or figure.source
            assert figure is None or figure.is_estimate or ("://" in figure.source and len(figure.date) == 10)
    assert "Q3_K" in device_named("android-8gb").slow_types
    assert "Q4_K" not in device_named("android-8gb").slow_types
    assert not {name for name in FORMATS if "hexagon" in FORMATS[name].fast_on} & set(
        device_named("android-12gb-hexagon").refused
    )
    with pytest.raises(RecipeError, match=r"toaster.*browser"):
        device_named("toaster")


def test_types_without_kernels_are_named(demo: Weights) -> None:
    model = open_model(checkpoint_dir())
    bf16 = weights_of(plan(model, open_recipe("bf16")), model)
    assert any(
        "BF16" in line and "no kernels" in line
        for line in fit(bf16, Settings(), device=device_named("browser")).warnings
    )
    assert not any("no kernels" in line for line in fit(demo, Settings(), device=device_named("android-8gb")).warnings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache_type_k": "q9"}, "q9"),
        ({"cache_type_v": "q8_0", "flash_attention": False}, "flash attention"),
        ({"context": 0}, "context 0"),
        ({"ubatch": 1 << 20}, "ubatch"),
        ({"draft": -1}, "draft"),
    ],
)
def test_settings_that_no_runtime_takes_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Settings(**changes)  # type: ignore[arg-type]


def test_nothing_to_draft_with(demo: Weights) -> None:
    with pytest.raises(RecipeError, match="draft"):
        fit(demo, Settings(draft=2), limit=1 << 30)
    with pytest.raises(RecipeError, match="device"):
        fit(demo, Settings())


def invoke(*words: str, exit_code: int) -> str:
    result = CliRunner().invoke(app, ["fit", *words])
    assert result.exit_code == exit_code, result.output
    return result.stdout


def test_the_command(tmp_path: Path) -> None:
    source = str(checkpoint_dir())
    document = json.loads(invoke(source, "--device", "android-6gb", "--context", "2048", "--json", exit_code=0))
    assert document["schema"] == "pocketquant.fit/1"
    assert document["fits"]
    assert document["total_bytes"] == sum(part["nbytes"] for part in document["parts"]) < document["limit_bytes"]
    assert 0 < document["speed_estimate"]["least"] < document["speed_estimate"]["most"]
    write(plan(open_model(checkpoint_dir()), open_recipe("pocket_4bit")), tmp_path / "a.gguf")
    again = json.loads(
        invoke(str(tmp_path / "a.gguf"), "--device", "android-6gb", "--context", "2048", "--json", exit_code=0)
    )
    assert again == document
    text = invoke(source, "--memory", "8MB", exit_code=1)
    assert "does not fit" in text
    assert "to make it fit: --ubatch-size 128" in text
    assert "raspberry-pi-5-8gb" in invoke("--devices", exit_code=0)
    assert len(json.loads(invoke("--devices", "--json", exit_code=0))["devices"]) == len(devices())
    invoke(exit_code=2)
    invoke(source, exit_code=2)
