"""Which files of a folder make the model, and that every other one is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from adapter_maker import make_adapter, rows_of
from checkpoint_maker import make_checkpoint, write_safetensors
from weight_cases import CASES, NEW, OLD, change_config

from pocketquant import open_model
from pocketquant.check import check_model
from pocketquant.convert import open_checkpoint
from pocketquant.convert.folder import KINDS, kind_of, list_entries, note_passed_over, top_level
from pocketquant.convert.quantized.settings import settings_file
from pocketquant.convert.repository import named_snapshot, small_files
from pocketquant.convert.snapshot import local_snapshot
from pocketquant.convert.sources import open_parts
from pocketquant.errors import ArchitectureError, SourceError
from pocketquant.model import Model

ROOT = Path(__file__).parents[2]


def holds(model: Model, weights: dict[str, np.ndarray]) -> bool:
    """Whether the model's embedding is that of the weights."""
    expected = weights["model.embed_tokens.weight"]
    return bool(np.abs(rows_of(model, "token_embd.weight") - expected).max() < 0.01)


def noted(model: Model) -> str:
    return "\n".join(model.notes)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("case", CASES)
def test_stale_index_and_other_saves_leave_the_weights_that_transformers_loads(case: str, tmp_path: Path) -> None:
    write_case, note = CASES[case]
    write_case(tmp_path / "c")
    model = open_model(tmp_path / "c")
    assert holds(model, NEW)
    assert note in noted(model)
    assert bool(model.notes) == bool(note)


def test_what_is_missing_from_a_file_read_alone_is_said_with_the_reason(tmp_path: Path) -> None:
    """transformers would start the norm from random numbers."""
    folder = make_checkpoint(tmp_path / "c", weights={k: v for k, v in NEW.items() if k != "model.norm.weight"})
    write_safetensors(folder / "extra.safetensors", {"model.norm.weight": NEW["model.norm.weight"]})
    weight_map = dict.fromkeys(NEW, "model.safetensors") | {"model.norm.weight": "extra.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ArchitectureError) as caught:
        open_model(folder)
    assert "  model.norm.weight [256]\nmodel.safetensors is read alone, as transformers does" in str(caught.value)


def test_stale_index_beside_a_file_that_was_named(tmp_path: Path) -> None:
    CASES["file beside older shards"][0](tmp_path / "c")
    model = open_model(tmp_path / "c/model.safetensors")
    assert holds(model, NEW)
    assert "passed over (shards of another save): model-00001-of-00003.safetensors" in noted(model)


@pytest.mark.parametrize("name", ["gone.safetensors", "../model.safetensors", 7, "pytorch_model.bin"])
def test_config_naming_no_weights_of_the_folder_is_refused(name: object, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=OLD)
    change_config(folder, transformers_weights=name)
    with pytest.raises(SourceError, match="transformers_weights"):
        open_model(folder)


def test_weights_under_one_other_name_are_taken(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=NEW)
    (folder / "model.safetensors").rename(folder / "model.safetensors-00001-of-00001.safetensors")
    assert holds(open_model(folder), NEW)


def test_weights_in_a_file_the_index_does_not_name_are_pointed_at(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=OLD, n_shards=2)
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model-00002-of-00003.safetensors")
    with pytest.raises(SourceError, match=r"beside it lies model-00002-of-00003\.safetensors, which the index does"):
        open_model(folder)


@pytest.mark.parametrize(
    ("file", "key", "name"),
    [
        ("config.json", "configuration_files", "config.4.0.0.json"),
        ("tokenizer_config.json", "fast_tokenizer_files", "tokenizer.4.0.json"),
    ],
)
def test_files_for_versions_of_transformers_are_refused(file: str, key: str, name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=OLD)
    plain = name.replace("4.0.0.", "").replace("4.0.", "")
    shutil.copy(folder / plain, folder / name)
    assert f"passed over ({kind_of(name).unread}): {name}" in noted(open_model(folder))
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, key: [plain, name]}))
    with pytest.raises(SourceError, match=f"has transformers load {name} in place of {plain}"):
        open_model(folder)


# ---------------------------------------------------------------- an adapter in the folder


def with_adapter(folder: Path, n_shards: int = 1) -> Path:
    """A model's folder with an adapter's files in it."""
    one = make_checkpoint(folder.with_name("one"), weights=OLD)
    adapter = make_adapter(folder.with_name("adapter"), one)
    make_checkpoint(folder, weights=OLD, n_shards=n_shards)
    for file in adapter.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


@pytest.mark.parametrize("n_shards", [1, 3])
def test_adapter_inside_the_models_folder_is_refused_and_named(n_shards: int, tmp_path: Path) -> None:
    folder = with_adapter(tmp_path / "c", n_shards)
    with pytest.raises(SourceError, match=r"a model and an adapter, adapter_model\.safetensors(.|\n)*--adapter .*/c;"):
        open_model(folder)


def test_adapter_inside_is_merged_when_it_is_named(tmp_path: Path) -> None:
    folder = with_adapter(tmp_path / "c")
    ours, expected = open_model(folder, adapter=folder), open_model(tmp_path / "one", adapter=tmp_path / "adapter")
    for tensor in expected.tensors:
        assert np.array_equal(rows_of(ours, tensor.name), rows_of(expected, tensor.name)), tensor.name
    assert "passed over" not in noted(ours)


def test_adapter_inside_is_left_out_when_the_weights_are_named(tmp_path: Path) -> None:
    folder = with_adapter(tmp_path / "c")
    model = open_model(folder / "model.safetensors")
    base = open_model(tmp_path / "one")
    assert np.array_equal(rows_of(model, "blk.0.attn_qkv.weight"), rows_of(base, "blk.0.attn_qkv.weight"))
    assert "passed over (an adapter that was not asked for): adapter_config.json, adapter_model" in noted(model)


def test_another_adapter_than_the_one_inside_is_the_one_that_counts(tmp_path: Path) -> None:
    folder = with_adapter(tmp_path / "c")
    model = open_model(folder, adapter=tmp_path / "adapter")
    assert "passed over (an adapter that was not asked for): adapter_config.json" in noted(model)
    assert "adapter adapter: merged" in noted(model)


def test_what_lies_beside_an_adapter_is_named_too(tmp_path: Path) -> None:
    folder = with_adapter(tmp_path / "c")
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (tmp_path / "adapter" / name).write_text("{}")
    model = open_model(tmp_path / "one", adapter=tmp_path / "adapter")
    assert "adapter adapter: passed over in its folder: README.md, chat_template.jinja, tokenizer.json; tok" in noted(
        model
    )
    assert "in its folder" not in noted(open_model(folder, adapter=folder))


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapters_folder_is_no_source(with_config: bool, tmp_path: Path) -> None:
    folder = with_adapter(tmp_path / "c")
    adapter = tmp_path / "adapter"
    if with_config:  # as TRL saves it, with the tokenizer
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / name, adapter / name)
    with pytest.raises(SourceError, match=r"adapter(.|\n)*--adapter .*/adapter") as refused:
        open_model(adapter)
    assert with_config or "'someone/base'" in str(refused.value)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapters.safetensors"])
def test_a_pickled_and_an_mlx_adapter_inside_are_seen_too(name: str, tmp_path: Path) -> None:
    folder = with_adapter(tmp_path / "c")
    (folder / "adapter_model.safetensors").rename(folder / name)
    with pytest.raises(SourceError, match=f"a model and an adapter, {name}"):
        open_model(folder)


def test_an_adapters_settings_alone_change_nothing(tmp_path: Path) -> None:
    folder = with_adapter(tmp_path / "c")
    (folder / "adapter_model.safetensors").unlink()
    assert "passed over (an adapter that was not asked for): adapter_config.json" in noted(open_model(folder))


def test_an_adapter_in_a_folder_of_its_own_is_no_part_of_the_model(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=OLD)
    make_adapter(folder / "adapter", folder)
    assert "passed over (folders are not looked into): adapter/" in noted(open_model(folder))


def test_an_adapters_repository_is_told_from_a_checkpoints() -> None:
    with pytest.raises(SourceError, match="an adapter and no checkpoint"):
        small_files("hf://org/lora", {"adapter_config.json": 900, "adapter_model.safetensors": 1 << 20})


# ---------------------------------------------------------------- the rest of the folder

REPOSITORY = [
    ".gitattributes",
    "LICENSE",
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "optimizer.pt",
    "rng_state_0.pth",
    "trainer_state.json",
    "training_args.bin",
    "pytorch_model.bin",
    "model-Q4_K_M.gguf",
    "modeling_custom.py",
    "tf_model.h5",
    "notes.xyz",
]
ALWAYS_READ = {name for name in REPOSITORY if not kind_of(name).unread}


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=OLD, n_shards=2)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for name in REPOSITORY:
        if not (folder / name).exists():
            (folder / name).write_text("{}" if name.endswith(".json") else "")
    (folder / "runs").mkdir()
    notes = noted(open_model(folder))
    passed_over = {name for note in notes.splitlines() for name in note.partition("): ")[2].split(", ")}
    read = {*ALWAYS_READ, "chat_template.jinja", "model.safetensors.index.json"}
    read |= {name for name in REPOSITORY if name.endswith(".safetensors")}
    assert passed_over == {*REPOSITORY, "runs/"} - read
    assert "passed over (the checkpoint has no vision tower): preprocessor_config.json" in notes
    assert "passed over (a trainer's state): optimizer.pt, rng_state_0.pth, runs/, trainer_state.json" in notes


@pytest.mark.parametrize("is_stated", [True, False])
def test_quantization_settings_that_config_comes_before_are_named(is_stated: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=OLD)
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}} if is_stated else {}
    notes = note_passed_over(list_entries(folder), {"model.safetensors", settings_file(config, folder)})
    assert ("quantize_config.json" in "".join(notes)) == is_stated


def test_a_check_of_a_checkpoint_says_it_too(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=OLD)
    (folder / "notes.xyz").touch()
    notes = check_model(open_model(folder)).notes
    assert sum("notes.xyz" in note for note in notes) == 1
    assert len(notes) == len(set(notes))


def test_a_hundred_thousand_files_are_one_line() -> None:
    notes = note_passed_over([f"sample-{i}.dat" for i in range(100_000)], ())
    assert notes == [
        "passed over (no file that a model is made of): "
        + ", ".join(f"sample-{i}.dat" for i in range(8))
        + " and 99992 more"
    ]


def test_names_that_are_no_text_are_made_safe() -> None:
    (note,) = note_passed_over(["a\nb \x1b[31m", "c\udcff.dat", "x" * 300], ())
    assert note.isprintable()
    assert r"c\udcff.dat" in note
    assert len(note) < 250


def test_a_folder_of_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketquant.convert.folder._MOST_ENTRIES", 4)
    for i in range(4):
        (tmp_path / f"{i}").touch()
    with pytest.raises(SourceError, match="give the model a folder of its own"):
        list_entries(tmp_path)


def test_a_repositorys_files_are_accounted_for_too(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=OLD)
    entries = top_level(["config.json", "model.safetensors", "pytorch_model.bin", "original/params.json", "a/b/c.txt"])
    with named_snapshot(folder, "Tiny", "hf://org/Tiny", local_snapshot(folder).weights, entries) as snapshot:
        notes = noted(open_checkpoint(snapshot))
    assert "passed over (folders are not looked into): a/, original/" in notes
    assert "passed over (pickled, which is never read): pytorch_model.bin" in notes


def test_the_sidecars_of_a_source_do_not_say_it_again(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=OLD)
    (folder / "notes.xyz").touch()
    parts = open_parts(folder)
    assert noted(parts.model).count("notes.xyz") == 1
    assert parts.vision is None
    assert parts.mtp is None


def test_the_guide_lists_every_kind_of_file() -> None:
    guide = (ROOT / "docs/explain/model-folder.md").read_text()
    for kind in KINDS:
        patterns = " ".join(f"`{pattern}`" for pattern in kind.patterns)
        assert f"| {patterns} | {kind.what} | {kind.done} |" in guide, kind.patterns
