"""The door for small files, and the odd files that once ended in a traceback, a hang or gigabytes."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_maker import make_checkpoint
from report_maker import make_evaluation
from vision_maker import make_vision_checkpoint

from pocketquant import open_model
from pocketquant.calibration.statistics import open_statistics
from pocketquant.convert.sources import find_repository, names_gguf, open_parts
from pocketquant.convert.vision import open_vision
from pocketquant.errors import ArchitectureError, EvalError, PocketquantError, RecipeError, SourceError
from pocketquant.eval.gate.decide import decide, read_report
from pocketquant.eval.gate.limits import Limits, read_limits
from pocketquant.eval.packs.pack import read_pack
from pocketquant.eval.report.html import read_sheet
from pocketquant.files.reading import sha256_of
from pocketquant.files.small import is_present, kind_of, parse_json, parse_toml, read_json
from pocketquant.gguf_file.header import encode_header
from pocketquant.gguf_file.identity import identify
from pocketquant.gguf_file.reading import is_gguf, read_header
from pocketquant.gguf_file.values import find_problem
from pocketquant.llama.vision import check_image
from pocketquant.model import Value
from pocketquant.quant import read_importance
from pocketquant.quant.loss_table import read_figures
from pocketquant.quant.recipe_text import open_recipe
from pocketquant.texts.corpus import read_text

DIGITS = "9" * 5000
READERS: list[Callable[[Path], Any]] = [
    *(read_json, read_text, read_limits, read_report, read_pack, read_figures, open_recipe, open_statistics),
    *(read_importance, check_image, sha256_of, identify, is_gguf, read_header),
]

# ---------------------------------------------------------------- the door


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket", "missing", "long name", "no UTF-8"])
def test_only_regular_files_are_read(read: Callable[[Path], Any], kind: str, tmp_path: Path) -> None:
    """A pipe would block for ever, and /dev/zero has no end."""
    path = tmp_path / {"long name": "n" * 300, "no UTF-8": "c\udcff.txt"}.get(kind, "file")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "no UTF-8":
        path.write_bytes(b"{}")
    elif kind == "socket":
        os.mknod(path, 0o600 | 0o140000)
    with pytest.raises(PocketquantError, match=r"cannot be read: |neither a recipe nor a file"):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "recursion|nested"),
        ("[" * 150 + "]" * 150, "nested deeper than 100"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ("[" + "[]," * 4_000_001 + "[]]", "lists and objects"),
        ('{"a": 1}\0', "Extra data"),
        (b"\xff\xfe{\0}\0", "byte 0 is not UTF-8"),
    ],
    ids=["brackets", "depth", "surrogate", "containers", "nul", "latin-1"],
)
def test_json_that_would_break_something_later(text: str | bytes, message: str) -> None:
    with pytest.raises(SourceError, match=rf"^f\.json: .*({message})"):
        parse_json(text, "f.json")


def test_numbers_beyond_f64_are_infinite() -> None:
    assert parse_json(f'[{DIGITS}, -{DIGITS}, 1e999, {10**308 - 1}, "\\ud83d\\ude00"]', "f.json") == [
        float("inf"),
        -float("inf"),
        float("inf"),
        10**308 - 1,
        "😀",
    ]


@pytest.mark.parametrize(
    "text",
    [f"a = {DIGITS}", "a = 0x" + "f" * 400, "a = " + "[" * 5000, ".".join("a" * 30_000) + " = 1", "a = 1\na = 2"],
)
def test_toml_that_would_break_something_later(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^f\.toml: not valid TOML: "):
        parse_toml(text, "f.toml", RecipeError)


def test_presence_of_what_cannot_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nothing")
    assert is_present(tmp_path / "link")
    assert not is_present(tmp_path / "file" / "below")
    assert (kind_of(tmp_path), kind_of("/dev/null"), kind_of(tmp_path / "link")) == ("folder", "other", "")
    for call in (is_present, kind_of, names_gguf, find_repository, open_model):
        with pytest.raises(SourceError, match="cannot be read: File name too long"):
            call(str(tmp_path / ("n" * 300)))
        with pytest.raises(SourceError, match="cannot be read"):
            call("a\0b")


# ---------------------------------------------------------------- beside good weights

_NO_REGEX = [{"type": "Split", "pattern": 5}, {"type": "ByteLevel"}]
REFUSED = {
    "generation_config.json": [
        *("[1]", '{"top_k": "x"}', '{"top_k": 20.5}', '{"temperature": 1e308}', "[" * 100_000, '{"top_p": NaN}'),
        *('{"top_k": 1e999}', f'{{"top_k": {DIGITS}}}', b'{"a": "\xe9"}', '{"eos_token_id": {"a": 1}}'),
    ],
    "tokenizer.json": [
        *({"added_tokens": 7}, {"added_tokens": "x"}, {"added_tokens": [7]}, {"model": 3}, {"normalizer": [[]]}),
        *({"pre_tokenizer": 5}, {"pre_tokenizer": {"type": "Sequence", "pretokenizers": _NO_REGEX}}),
        {"model": {"type": "BPE", "vocab": {"\ud800": 0}, "merges": []}},
    ],
    "tokenizer_config.json": [
        *({"added_tokens_decoder": [1]}, {"added_tokens_decoder": {DIGITS: {"content": "x"}}}),
        *({"chat_template": 5}, {"chat_template": "a\0b"}),
        *({"eos_token": ["a"]}, {"eos_token": 5}, {"extra_special_tokens": [5]}, {"extra_special_tokens": 5}),
        *({"additional_special_tokens": {"a": 1}}, {"pad_token": {"lstrip": True}}),
    ],
    "config.json": [
        *({"full_attention_interval": "x", "layer_types": None}, {"full_attention_interval": "x"}),
        *(
            {"full_attention_interval": -1},
            {"full_attention_interval": True},
            {"num_attention_heads": [4], "head_dim": None},
        ),
        *({"rope_parameters": {"rope_theta": 10**400}}, {"text_config": 7}, {"rms_norm_eps": "x"}),
        {"vocab_size": 10**400},
    ],
    "chat_template.jinja": [b"\xe9"],
    "chat_template.json": ["[]", '{"chat_template": ["a"]}x'],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("good") / "Tiny-1M")


@pytest.mark.parametrize(("name", "content"), [(name, each) for name, contents in REFUSED.items() for each in contents])
def test_odd_files_that_decide_are_refused(name: str, content: Any, good: Path, tmp_path: Path) -> None:
    folder = beside(good, tmp_path, name, content)
    with pytest.raises(PocketquantError) as caught:
        encode_header(open_model(folder).metadata, ())
    assert good.name in str(caught.value) or name in str(caught.value) or "tokenizer.chat_template" in str(caught.value)
    assert len(max(str(caught.value).split("\n"), key=len)) < 1100


@pytest.mark.parametrize(
    ("front", "expected", "note"),
    [
        ("version: 1.50", {"general.version": "1.50"}, ""),
        ("tags: [2024, chat]", {"general.tags": ["2024", "chat"]}, ""),
        ("language: [no]", {"general.languages": ["no"]}, ""),
        ("language: no", {"general.languages": ["no"]}, ""),
        ("model_name: 3.5", {"general.name": "3.5"}, ""),
        ("author: 7", {"general.author": "7"}, ""),
        ("date: 2024-13-45", {}, ""),
        ("license: {name: mine}", {}, "license left out"),
        ("license: [mit, {a: b}]", {"general.license": "mit"}, "license: 1 entries left out"),
        ("tags: [[a], b]", {"general.tags": ["b"]}, "tags: 1 entries left out"),
        ("tags: &a [x, *a]", {"general.tags": ["x"]}, "tags: 1 entries left out"),
        ("base_model: &a {b: *a}", {}, "base_model left out"),
        ('author: "a\\0b"', {}, "author left out"),
        ("foo: [unclosed", {}, "broken YAML"),
        ("a: b: c", {}, "broken YAML"),
        ('license: "\\UFFFFFFFF"', {}, "broken YAML"),
        ("tags: !!bool x", {}, "broken YAML"),
        ('pipeline_tag: !!int ""', {}, "broken YAML"),
        ("tags: !!timestamp foo", {}, "broken YAML"),
        ("a: \x1b[2J", {}, "broken YAML"),
        ("- a", {}, "no list of keys and values"),
        ("a: " + "[" * 30_000, {}, "broken YAML"),
        ("a: " + DIGITS + "\nauthor: me", {"general.author": "me"}, ""),
        ("a: " + "x" * 70_000, {}, "more than 65536"),
    ],
)
def test_a_model_card_describes_and_stops_nothing(
    front: str, expected: dict[str, Any], note: str, good: Path, tmp_path: Path
) -> None:
    model = open_model(beside(good, tmp_path, "README.md", f"---\n{front}\n---\n# Tiny"))
    found = {key: value.value for key, value in model.metadata.items()}
    assert {key: found.get(key) for key in expected} == expected
    notes = [text for text in model.notes if text.startswith("model card")]
    assert len(notes) == bool(note)
    assert not note or note in notes[0]
    encode_header(model.metadata, ())


@pytest.mark.parametrize("content", [b"---\nauthor: Andr\xe9\n---\n", b"---\nauthor: me"])
def test_a_card_in_latin_1_or_without_an_end(content: bytes, good: Path, tmp_path: Path) -> None:
    model = open_model(beside(good, tmp_path, "README.md", content))
    assert ("general.author" in model.metadata) == (b"me" in content)
    assert any("not UTF-8" in note for note in model.notes) == (b"me" not in content)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "zero", "link to nothing"])
def test_a_pipe_or_a_device_in_place_of_a_small_file(name: str, kind: str, good: Path, tmp_path: Path) -> None:
    folder = beside(good, tmp_path, name, "")
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "zero" else "nothing")
    with pytest.raises(PocketquantError, match=name):
        open_model(folder)


def test_a_card_that_is_a_pipe(good: Path, tmp_path: Path) -> None:
    folder = beside(good, tmp_path, "x", "")
    os.mkfifo(folder / "README.md")
    assert any("it is a pipe" in note for note in open_model(folder).notes)


def test_a_folder_whose_name_is_no_utf_8(good: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/c\xff"))
    folder.symlink_to(good)
    with pytest.raises(SourceError, match=r"the folder's name(.|\n)*surrogate pair(.|\n)*rename it"):
        open_model(folder)


@pytest.mark.parametrize("change", [{"depth": 200_000}, {"depth": 1 << 24}])
def test_a_tower_is_as_deep_as_its_tensors(change: dict[str, Any], tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path / "v")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArchitectureError, match=r"vision_config\.depth: \d+ blocks, and there are only \d+ tensors"):
        open_parts(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_the_file_that_scales_pixels_wrong_is_named(tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path / "v")
    later = {"image_processor": {"image_mean": [1e308] * 3, "rescale_factor": 1}}
    (folder / "processor_config.json").write_text(json.dumps(later))
    with pytest.raises(SourceError) as caught:
        open_vision(folder)
    assert "\n  processor_config.json: image_mean: [1e+308" in str(caught.value)
    assert "\n  processor_config.json: rescale_factor: 1, llama.cpp" in str(caught.value)


@pytest.mark.parametrize("key", ["image_mean", "image_std"])
@pytest.mark.parametrize("value", [1e308, 10**400, -1, float("nan"), "x"])
def test_pixels_are_scaled_by_numbers(key: str, value: Any, tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path / "v")
    scaling = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, key: [0.5, value, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(scaling))
    if (key, value) == ("image_mean", -1):
        assert open_vision(folder) is not None
        return
    with pytest.raises(
        PocketquantError, match=rf"  preprocessor_config\.json: {key}: .*expected (three|positive) number"
    ):
        open_vision(folder)


def beside(good: Path, tmp_path: Path, name: str, content: Any) -> Path:
    """The good checkpoint with one other file; a dictionary is put over the file's own keys, None takes one away."""
    folder = tmp_path / good.name
    folder.mkdir()
    for path in good.iterdir():
        (folder / path.name).symlink_to(path)
    if isinstance(content, dict):
        merged = json.loads((good / name).read_text()) | content
        content = json.dumps({key: value for key, value in merged.items() if value is not None})
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# ---------------------------------------------------------------- limits, sensitivities, reports


@pytest.mark.parametrize(
    ("read", "content", "error"),
    [
        (read_limits, f"[absolute]\nkld_mean = {DIGITS}", EvalError),
        (read_figures, f"schema = {DIGITS}", RecipeError),
        (read_figures, f'{{"schema": {DIGITS}}}', RecipeError),
        (open_recipe, f"file_type = {DIGITS}", RecipeError),
    ],
)
def test_a_number_of_5000_digits(
    read: Callable[[Path], Any], content: str, error: type[PocketquantError], tmp_path: Path
) -> None:
    (tmp_path / "f").write_text(content)
    with pytest.raises(error, match="/f: "):
        read(tmp_path / "f")


_TYPED_WRONG: list[tuple[str, Any]] = [
    ("provenance", [1]),
    ("provenance.reference", 3),
    ("provenance.model.name", ["x"]),
    ("provenance.reference_pack.model", [1]),
    ("provenance.reference_pack.is_lower_bound", "no"),
    ("provenance.context", []),
    ("provenance.versions", "x"),
    ("provenance.versions.numpy", 2),
    ("provenance.reference_quantized", True),
    ("tokens", float("inf")),
    ("tokens", "many"),
    ("windows", 2.5),
    ("non_finite", -1),
    ("metrics.kld", 0.1),
    ("metrics.kld.mean", "0.1"),
    ("by_domain", {"a": 1}),
    ("by_domain[0].file.size", "x"),
    ("by_position[1].kld", "high"),
    ("noise_floor.metrics", 7),
    ("tensors[0].layer", "x"),
    ("sums", [3]),
]


@pytest.mark.parametrize(("place", "value"), _TYPED_WRONG)
def test_a_report_with_a_value_of_another_kind(place: str, value: Any, tmp_path: Path) -> None:
    """Neither a gate nor a page may take it for nothing, or for something."""
    report = make_evaluation("Tiny", kld=0.01)
    report["provenance"]["reference_pack"] = {"kind": "top", "top": 64, "model": report["provenance"]["reference"]}
    owner: Any = report
    *way, last = re.findall(r"\w+", place)
    for key in way:
        owner = owner[int(key)] if key.isdigit() else owner[key]
    owner[last] = value
    release = {"schema": "pocketquant.make/1", "variants": [{"file": "x", "evaluation": report}]}
    path = tmp_path / "r.json"
    for document, file in ((report, None), (release, "x")):
        path.write_text(json.dumps(document))
        for read in (lambda file=file: read_report(path, file), lambda: read_sheet([path])):
            with pytest.raises(EvalError, match=r"values of another kind") as caught:
                read()
            assert re.search(rf"(\.| ){re.escape(place)}(\[0\])?: ", str(caught.value))


def test_a_report_whose_values_are_null_says_nothing(tmp_path: Path) -> None:
    report = make_evaluation("Tiny", kld=0.01) | {"by_position": None, "noise_floor": None, "tensors": None}
    report["provenance"] |= {"model": None, "chunks": None}
    (tmp_path / "r.json").write_text(json.dumps(report))
    assert read_report(tmp_path / "r.json").model == ("None", "None")


def test_a_report_with_a_count_of_5000_digits(tmp_path: Path) -> None:
    report = json.dumps(make_evaluation("Tiny", kld=0.01))
    (tmp_path / "r.json").write_text(report.replace('"tokens": 1001', f'"tokens": {DIGITS}'))
    for read in (read_report, lambda path: read_sheet([path])):
        with pytest.raises(EvalError, match="tokens: inf, expected a whole number"):
            read(tmp_path / "r.json")


@pytest.mark.parametrize("clusters", [10**12, 1e300, 0, -1, 2.5])
def test_a_report_of_more_clusters_than_there_can_be(clusters: float, tmp_path: Path) -> None:
    changes = {"clusters": clusters, "non_finite_model": 0}
    (tmp_path / "r.json").write_text(json.dumps(make_evaluation("Tiny", kld=0.01) | changes))
    report = read_report(tmp_path / "r.json")
    limits = Limits({}, {"kld_p99_ratio": 1.5})
    if clusters == 10**12:
        assert decide(report, limits, report).decisions
        return
    with pytest.raises(EvalError, match="clusters is"):
        decide(report, limits, report)


def test_a_report_with_half_a_surrogate_pair(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(make_evaluation("\ud800", kld=0.01)))
    for read in (read_report, lambda path: read_sheet([path])):
        with pytest.raises(SourceError, match="half of a surrogate pair"):
            read(tmp_path / "r.json")


def test_a_report_with_numbers_that_no_axis_has(tmp_path: Path) -> None:
    from pocketquant.eval.report.html import to_html

    for kld in (1e-320, 1e308):
        (tmp_path / "r.json").write_text(json.dumps(make_evaluation("Tiny", kld=kld)))
        assert "<svg" in to_html(read_sheet([tmp_path / "r.json"]))


def test_statistics_with_a_list_for_a_dtype(tmp_path: Path) -> None:
    about = json.dumps({"tokens": 1, "model": "m", "texts": [], "shared": {}})
    metadata = {"format": "pocketquant.statistics", "version": "2", "about": about}
    header = json.dumps({"__metadata__": metadata, "a/input": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}})
    (tmp_path / "s").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(RecipeError, match="a/input: no array of statistics"):
        open_statistics(tmp_path / "s")


# ---------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        ("u32", 1 << 32, "is no u32"),
        ("u32", -1, "is no u32"),
        ("i32", True, "is no i32"),
        ("u32", 1.0, "is no u32"),
        ("f32", 1e308, "is no finite f32"),
        ("f32", float("nan"), "is no finite f32"),
        ("f32[]", [0.5, float("inf")], "is no finite f32"),
        ("i32[]", [0, "x"], "is no i32"),
        ("i32[]", 7, "is no list"),
        ("bool", 1, "is no bool"),
        ("str", 7, "is no text"),
        ("str", "a\0b", "holds a NUL"),
        ("str[]", ["a", "\udcff"], "half of a surrogate pair"),
        ("str[]", ["a", 7], "is no text"),
        ("u8", 255, ""),
        ("i64[]", [-(1 << 63), (1 << 63) - 1], ""),
        ("f32", 3.4028234e38, ""),
        ("f32", 1, ""),
        ("str[]", [], ""),
    ],
)
def test_metadata_is_typed_before_it_is_packed(kind: str, value: Any, problem: str) -> None:
    assert (problem in find_problem(Value(kind, value))) if problem else find_problem(Value(kind, value)) == ""
    if problem:
        with pytest.raises(SourceError, match=rf"general\.x: .*{problem}"):
            encode_header({"general.x": Value(kind, value)}, ())
    else:
        assert encode_header({"general.x": Value(kind, value)}, ())[:4] == b"GGUF"
