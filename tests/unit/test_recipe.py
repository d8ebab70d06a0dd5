"""Recipes: parsed strictly, first match wins, every condition, and the shapes that do not fit a block."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from qwen35_inventory import QWEN35_08B, QWEN35_4B, QWEN35_9B, QWEN35_35B_A3B, Dimensions, build_model

from pocketquant.errors import RecipeError
from pocketquant.formats import FORMATS
from pocketquant.model import Model, Role, Value
from pocketquant.quant import Importance, builtin_recipes, choose_formats, open_recipe, parse_recipe, plan
from pocketquant.quant.recipe import MAX_RECIPE_BYTES, uses_more_bits

HEAD = 'name = "x"\ndescription = "x"\nfile_type = 15\ndefault = "Q4_K"\n'


def chosen(model: Model, text: str, has_importance: bool = False) -> dict[str, str]:
    recipe = parse_recipe(HEAD + text, "test")
    return {tensor.name: format.name for tensor, format, _ in choose_formats(model, recipe, has_importance)}


def test_builtin_recipes_are_all_there_and_named_like_their_files() -> None:
    wanted = "bf16 f16 f32 iq4_nl iq4_xs pocket_4bit pocket_5bit pocket_8bit pocket_mmproj q4_0 "
    wanted += "q4_k_m q4_k_s q5_k_m q5_k_s q6_k q8_0"
    assert builtin_recipes() == tuple(wanted.split())
    for name in builtin_recipes():
        assert open_recipe(name).name == name
    assert open_recipe("Q4_K_M") == open_recipe("q4_k_m")


def test_first_match_wins() -> None:
    first = '[[rules]]\nroles = ["ffn_down"]\nformat = "Q6_K"\nreason = "a"\n'
    second = '[[rules]]\nroles = ["ffn_down", "ffn_up"]\nformat = "Q8_0"\nreason = "b"\n'
    types = chosen(build_model(Dimensions()), first + second)
    assert types["blk.0.ffn_down.weight"] == "Q6_K"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate.weight"] == "Q4_K"


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        (["0"], [0]),
        (["-1"], [15]),
        (["-16"], [0]),
        (["2-4"], [2, 3, 4]),
        (["14-99"], [14, 15]),
        (["first_eighth"], [0, 1]),
        (["last_sixteenth"], [15]),
        (["first_eighth", "7", "-2"], [0, 1, 7, 14]),
        (["more_bits"], [0, 1, 4, 7, 10, 13, 14, 15]),
        (["99"], []),
    ],
)
def test_words_for_layers(words: list[str], layers: list[int]) -> None:
    types = chosen(build_model(Dimensions(n_layer=16)), f'[[rules]]\nlayers = {words}\nformat = "Q8_0"\nreason = "x"\n')
    assert [i for i in range(16) if types[f"blk.{i}.ffn_up.weight"] == "Q8_0"] == layers
    assert types["token_embd.weight"] == "Q4_K", "a rule about layers says nothing about tensors outside them"


@pytest.mark.parametrize(("n_layer", "expected"), [(1, [0]), (4, [2, 3]), (7, [2, 5, 6]), (8, [0, 3, 6, 7])])
def test_more_bits_where_an_eighth_is_less_than_a_layer(n_layer: int, expected: list[int]) -> None:
    assert [i for i in range(n_layer) if uses_more_bits(i, n_layer)] == expected


def test_conditions_on_the_model_and_the_matrix() -> None:
    tied, untied = build_model(Dimensions()), build_model(Dimensions(tied=False))
    rule = '[[rules]]\nroles = ["embed"]\nformat = "Q6_K"\nreason = "x"\n'
    for condition, hits, misses in (("true", tied, untied), ("false", untied, tied)):
        assert chosen(hits, f"{rule}tied = {condition}")["token_embd.weight"] == "Q6_K"
        assert chosen(misses, f"{rule}tied = {condition}")["token_embd.weight"] == "Q4_K"
    assert chosen(tied, f"{rule}importance = true", True)["token_embd.weight"] == "Q6_K"
    assert chosen(tied, f"{rule}importance = true", False)["token_embd.weight"] == "Q4_K"
    assert chosen(tied, f"{rule}importance = false", True)["token_embd.weight"] == "Q4_K"
    wide = build_model(Dimensions(n_head=8, n_kv=2))
    assert chosen(wide, f"{rule}min_gqa = 4")["token_embd.weight"] == "Q6_K"
    assert chosen(tied, f"{rule}min_gqa = 4")["token_embd.weight"] == "Q4_K"


@pytest.mark.parametrize(
    ("format", "n_cols", "fallback"),
    [
        ("Q4_K", 320, "Q5_0"),
        ("Q5_K", 320, "Q5_1"),
        ("Q6_K", 320, "Q8_0"),
        ("IQ4_XS", 320, "IQ4_NL"),
        ("Q4_K", 72, "F16"),
        ("Q8_0", 72, "F16"),
        ("Q4_K", 512, "Q4_K"),
    ],
)
def test_rows_that_do_not_fit_a_block(format: str, n_cols: int, fallback: str) -> None:
    recipe = parse_recipe(HEAD.replace("Q4_K", format), "test")
    choices = {
        tensor.name: (got.name, reason)
        for tensor, got, reason in choose_formats(build_model(Dimensions(n_embd=n_cols)), recipe, False)
    }
    got, reason = choices["blk.0.ffn_up.weight"]
    assert got == fallback
    assert (f"{n_cols} columns" in reason) == (fallback != format)


def test_tensors_that_runtimes_want_in_f32_stay_f32() -> None:
    model = build_model(Dimensions())
    for tensor, format, reason in choose_formats(model, open_recipe("q4_0"), False):
        assert (format.name == "F32") == tensor.keep_f32, tensor.name
        assert reason


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("colour = 1", "unknown key 'colour'"),
        ('[[rules]]\nformat = "Q4_K"\nreason = "x"\ncolour = 1', "rule 1: unknown key 'colour'"),
        ('[[rules]]\nformat = "Q4_K"\nreason = "x"\nroles = ["atn_v"]', "rule 1: unknown role 'atn_v'"),
        ('[[rules]]\nformat = "Q4_K"\nreason = "x"\nroles = []', "rule 1: roles: expected a list"),
        ('[[rules]]\nformat = "Q4_K"\nreason = "x"\nroles = "ffn_up"', "rule 1: roles: expected a list"),
        ('[[rules]]\nformat = "Q4_Z"\nreason = "x"', "rule 1: unknown format 'Q4_Z'"),
        ('[[rules]]\nformat = "Q4_K"', "rule 1: reason is missing"),
        ('[[rules]]\nreason = "x"', "rule 1: format is missing"),
        ('[[rules]]\nformat = "Q4_K"\nreason = "x"\nlayers = ["middle"]', "rule 1: unknown layers 'middle'"),
        ('[[rules]]\nformat = "Q4_K"\nreason = "x"\nlayers = ["4-2"]', "rule 1: unknown layers '4-2'"),
        ('[[rules]]\nformat = "Q4_K"\nreason = "x"\nlayers = ["-0"]', "rule 1: unknown layers '-0'"),
        ('[[rules]]\nformat = "Q4_K"\nreason = "x"\nlayers = [1]', "rule 1: layers: expected a list"),
        ('[[rules]]\nformat = "Q4_K"\nreason = "x"\ntied = 1', "rule 1: tied: expected true or false"),
        ('[[rules]]\nformat = "Q4_K"\nreason = "x"\nmin_gqa = true', "rule 1: min_gqa: expected a whole number"),
        ('[[rules]]\nformat = "Q4_K"\nreason = "x"\nmin_gqa = 0', "rule 1: min_gqa: expected a whole number"),
        ("rules = 3", "rules: write each one as"),
        ("this is no TOML", "not valid TOML"),
        ("x = " + "[" * 20000, "not valid TOML"),
        ("x = " + "9" * 20000, "unknown key 'x'|not valid TOML"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        parse_recipe(HEAD + text, "test")


@pytest.mark.parametrize("value", ['"15"', "15.0", "true", "-1", "1024"])
def test_file_type_must_be_a_number_of_llama_cpp_s(value: str) -> None:
    with pytest.raises(RecipeError, match="file_type: expected a whole number"):
        parse_recipe(HEAD.replace("15", value), "test")


def test_all_faults_come_in_one_message() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe('name = "A B"\ncolour = 1\n[[rules]]\nroles = ["x"]\n', "mine.toml")
    message = str(caught.value)
    for piece in ("mine.toml", "'colour'", "'A B'", "default is missing", "file_type is missing", "role 'x'"):
        assert piece in message


def test_files(tmp_path: Path) -> None:
    good = tmp_path / "mine.toml"
    good.write_text(HEAD, encoding="utf-8")
    assert open_recipe(good).default is FORMATS["Q4_K"]
    with pytest.raises(RecipeError, match=r"neither a recipe nor a file.*\n.*q4_k_m"):
        open_recipe(tmp_path / "missing.toml")
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))
    with pytest.raises(RecipeError, match="larger than"):
        open_recipe(large)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        open_recipe(binary)


def test_plan_lies_aligned_and_adds_up() -> None:
    model = build_model(Dimensions(n_layer=8))
    made = plan(model, open_recipe("q4_k_m"), metadata_extra={"pocketquant.note": Value("str", "hello")})
    end = 0
    for item in made.tensors:
        assert item.offset % 32 == 0
        assert 0 <= item.offset - end < 32
        assert item.nbytes == item.tensor.n_rows * item.format.row_bytes(item.tensor.n_cols)
        end = item.offset + item.nbytes
    assert made.file_bytes == len(made.header) + end + -end % 32
    assert made.metadata["general.file_type"] == Value("u32", 15)
    assert made.metadata["general.quantization_version"] == Value("u32", 2)
    assert made.metadata["pocketquant.recipe"] == Value("str", "q4_k_m")
    assert made.metadata["pocketquant.note"] == Value("str", "hello")
    assert not any(key.startswith("quantize.imatrix") for key in made.metadata)
    assert made.importance == {}


def test_plan_uses_importance_where_numbers_are_rounded() -> None:
    model = build_model(Dimensions())
    ones = {tensor.name: tensor.rows(0, 1)[0] ** 2 for tensor in model.tensors if tensor.role is Role.FFN_UP}
    made = plan(model, open_recipe("q4_k_m"), Importance(ones, "m.gguf", ("a.txt", "b.txt"), 7))
    assert set(made.importance) == set(ones)
    reasons = {item.tensor.name: item.reason for item in made.tensors}
    assert "no importance" in reasons["blk.0.ffn_down.weight"]
    assert "no importance" not in reasons["blk.0.ffn_up.weight"] + reasons["blk.0.attn_norm.weight"]
    described = {key: value.value for key, value in made.metadata.items() if key.startswith("quantize.imatrix.")}
    assert described == {
        "quantize.imatrix.file": "m.gguf",
        "quantize.imatrix.dataset": "a.txt",
        "quantize.imatrix.entries_count": 4,
        "quantize.imatrix.chunks_count": 7,
    }
    exact = plan(model, open_recipe("bf16"), Importance(ones, "m.gguf"))
    assert exact.importance == {}
    assert "quantize.imatrix.file" not in exact.metadata


def test_numbers_are_not_rounded_twice() -> None:
    model = build_model(Dimensions(), dtype="Q8_0")
    assert plan(model, open_recipe("q8_0")).tensors[0].format.name == "Q8_0"
    assert plan(model, open_recipe("f32")).tensors[0].format.name == "F32"
    with pytest.raises(RecipeError, match=r"token_embd.weight: stored as Q8_0, would become Q6_K[\s\S]*Start from"):
        plan(model, open_recipe("q4_k_m"))
    with pytest.raises(RecipeError, match="quantized already"):
        plan(model, open_recipe("f16"))
    mixed = replace(model, tensors=tuple(replace(t, dtype="F8_E4M3") for t in model.tensors))
    assert plan(mixed, open_recipe("q4_k_m")).tensors[0].format.name == "Q6_K"


@pytest.mark.parametrize("shape", [QWEN35_08B, QWEN35_4B], ids=["0.8B", "4B"])
def test_pocket_4bit_is_no_larger_than_q4_k_m(shape: Dimensions) -> None:
    model = build_model(shape)
    sizes = {name: plan(model, open_recipe(name)).file_bytes for name in ("pocket_4bit", "q4_k_m")}
    assert sizes["pocket_4bit"] <= sizes["q4_k_m"]
    if shape is QWEN35_4B:
        assert sizes["pocket_4bit"] < 2.70e9, "leaves room for a vision tower under 3.00e9 bytes"


@pytest.mark.parametrize("shape", [QWEN35_08B, QWEN35_4B, QWEN35_9B, QWEN35_35B_A3B])
def test_larger_pocket_recipes_are_the_size_they_say(shape: Dimensions) -> None:
    model = build_model(shape)
    names = ("pocket_5bit", "q5_k_m", "pocket_8bit", "q8_0")
    sizes = {name: plan(model, open_recipe(name)).file_bytes for name in names}
    assert sizes["pocket_5bit"] <= 1.01 * sizes["q5_k_m"]
    assert sizes["pocket_8bit"] <= 1.002 * sizes["q8_0"]


def test_pocket_4bit_keeps_deltanet_s_gates_fine_and_takes_formats_with_fast_paths_on_phones() -> None:
    formats = defaultdict(set)
    for tensor, format, _ in choose_formats(build_model(QWEN35_4B), open_recipe("pocket_4bit"), False):
        formats[tensor.role].add(format.name)
    assert formats[Role.DELTA_ALPHA] == formats[Role.DELTA_BETA] == {"Q8_0"}
    assert set().union(*formats.values()) <= {"F32", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL"}
