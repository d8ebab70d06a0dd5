"""A size as the input: predicted losses, the plan that meets a target, its explanation, and recipes from files."""

from __future__ import annotations

import time
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from qwen35_inventory import QWEN35_08B, QWEN35_4B, QWEN35_9B, QWEN35_35B_A3B, Dimensions, RandomRows, build_model

from pocketquant.calibration.statistics import fingerprint
from pocketquant.errors import ArchitectureError, RecipeError, SourceError
from pocketquant.formats import FORMATS
from pocketquant.gguf_file.writing import write
from pocketquant.model import Allocation, Model, Plan, Role, Tensor, padded
from pocketquant.quant import (
    Choice,
    Importance,
    Recipe,
    Target,
    builtin_recipes,
    explain,
    format_recipe,
    open_recipe,
    parse_recipe,
    parse_sensitivity,
    plan,
    read_sensitivity,
)
from pocketquant.quant.allocation import list_options
from pocketquant.quant.loss_table import LossTable
from pocketquant.quant.prediction import PREDICTED
from pocketquant.quant.recipe_text import check_types, recipe_of_types
from pocketquant.quant.sensitivity import UNTIED_EMBED

TABLE = """
schema = 1
source = "a test"
[[measured]]
model = "x"
n_weights = 1000000
n_layer = 5
floor = 0.001
[measured.whole_model]
Q3_K = 0.041
Q4_K = 0.011
Q5_K = 0.004
Q6_K = 0.002
Q8_0 = 0.0011
[measured.roles.embed]
loss = [0.5]
[measured.roles.ffn_down]
layers = [0, 1, 2, 3, 4]
loss = [0.9, 0.1, 0.2, 0.4, 0.7]
"""


def allocated(made: Plan) -> Allocation:
    assert made.allocation is not None
    return made.allocation


def recipe_of(made: Plan) -> Recipe:
    types = {(item.tensor.role, item.tensor.layer): item.format for item in made.tensors if not item.tensor.keep_f32}
    return recipe_of_types(str(made.metadata["pocketquant.recipe"].value), "a plan's types", types, "as planned")


def only(*tensors: tuple[str, Role, int | None], n_layer: int = 5, tied: bool = True) -> Model:
    made = [Tensor(name, role, layer, (4, 256), "F32", RandomRows(name, 256)) for name, role, layer in tensors]
    if not tied:
        made.append(Tensor("output.weight", Role.HEAD, None, (4, 256), "F32", RandomRows("output", 256)))
    return Model(
        "qwen35", build_model(Dimensions()).metadata, tuple(made), {"n_layer": n_layer, "n_head": 1, "n_kv": 1}
    )


def relative(model: Model) -> list[float]:
    losses = list(parse_sensitivity(TABLE, "test").predict(model).at_q4_k.values())
    return [loss / losses[0] for loss in losses]


# ---------------------------------------------------------------- predictions


def test_a_measured_model_gets_its_own_figures() -> None:
    model = only(("token_embd", Role.EMBED, None), *((f"d{i}", Role.FFN_DOWN, i) for i in range(5)))
    prediction = parse_sensitivity(TABLE, "test").predict(model)
    total = 0.5 + 0.9 + 0.1 + 0.2 + 0.4 + 0.7
    assert prediction.at_q4_k["d2"] == pytest.approx(0.2 / total * (0.011 - 0.001)), "the floor is no weight's"
    assert sum(prediction.at_q4_k.values()) == pytest.approx(0.010), "all in Q4_K: the measured whole"
    errors = {"Q3_K": 4.0, "Q4_K": 1.0, "Q5_K": 0.3, "Q6_K": 0.1, "Q8_0": 0.01, "F16": 0.0, "BF16": 0.0, "F32": 0.0}
    assert prediction.error == pytest.approx(errors)
    assert prediction.loss(model.tensors[3], "Q5_K") == pytest.approx(0.3 * prediction.at_q4_k["d2"])


def test_depth_is_relative_and_the_ends_keep_their_own_figures() -> None:
    model = only(*((f"d{i}", Role.FFN_DOWN, i) for i in range(9)), n_layer=9)
    found = np.array(relative(model)) * 0.9
    assert found[8] == pytest.approx(0.7)
    inner = found[1:8] * 7 / 3  # 3 blocks between the ends were measured, these are 7
    assert inner[[0, 1, 3, 5, 6]] == pytest.approx([0.1, 0.1, 0.2, 0.4, 0.4])
    assert inner[2] == pytest.approx((0.1 * 0.2) ** 0.5), "halfway between two layers: the geometric mean"


def test_roles_nobody_measured_stand_for_one_that_was() -> None:
    tied = only(("token_embd", Role.EMBED, None), ("d", Role.FFN_DOWN, 2))
    untied = only(("token_embd", Role.EMBED, None), ("d", Role.FFN_DOWN, 2), tied=False)
    assert relative(tied) == pytest.approx([1, 0.2 / 0.5])
    assert relative(untied) == pytest.approx([1, 0.2 / 0.5 / UNTIED_EMBED, 1 / UNTIED_EMBED])
    experts = only(("d", Role.FFN_DOWN, 2), ("e", Role.EXPERT_DOWN, 2), ("s", Role.SHARED_DOWN, 3))
    assert relative(experts) == pytest.approx([1, 1, 2])
    with pytest.raises(RecipeError, match=r"no sensitivity[\s\S]*attn_q[\s\S]*ffn_up"):
        relative(only(("d", Role.FFN_DOWN, 2), ("q", Role.ATTN_Q, 3), ("u", Role.EXPERT_UP, 2), ("f", Role.FFN_UP, 2)))


def test_packaged_figures_are_the_published_ones() -> None:
    """KL divergence of Qwen3.5-4B in one format, and of single tensors, as published; nothing else but their scale."""
    model = build_model(QWEN35_4B)
    prediction = read_sensitivity().predict(model)
    assert sum(prediction.at_q4_k.values()) == pytest.approx(0.033932 - 0.00107, rel=1e-3)
    assert prediction.error["Q6_K"] == pytest.approx((0.00313 - 0.00107) / (0.033932 - 0.00107), rel=1e-2)
    down = prediction.at_q4_k["blk.0.ffn_down.weight"]
    for name, figure in (("blk.31.ffn_up", 0.015950), ("token_embd", 0.272768), ("blk.23.attn_v", 0.002229)):
        assert prediction.at_q4_k[f"{name}.weight"] / down == pytest.approx(figure / 0.007294, rel=1e-2)


def test_a_model_between_two_measured_ones_lies_between_them() -> None:
    table = read_sensitivity()
    small, large = (table.predict(build_model(d)).error["Q3_K"] for d in (QWEN35_08B, QWEN35_4B))
    middle = table.predict(build_model(Dimensions(24, 2048, 6144, 8, 2, 256, 16, 16, 128, 248320))).error["Q3_K"]
    assert large < middle < small
    assert table.predict(build_model(QWEN35_9B)).error["Q3_K"] == pytest.approx(large)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema = 2", r"schema: expected 1[\s\S]*source[\s\S]*measured"),
        ("a = [", "not valid TOML"),
        (TABLE.replace("loss = [0.5]", "loss = [0.5, 0.1]"), "2 figures for 1 layers"),
        (TABLE.replace("[0, 1, 2, 3, 4]", "[0, 1, 3, 2, 4]"), "expected rising numbers from 0 to 4"),
        (TABLE.replace("[0, 1, 2, 3, 4]", "[0, 1, 2, 3, 5]"), "expected rising numbers from 0 to 4"),
        (TABLE.replace("0.9, 0.1", "nan, 0.1"), "numbers above 0"),
        (TABLE.replace("0.9, 0.1", "-1, 0.1"), "numbers above 0"),
        (TABLE.replace("n_weights = 1000000", "n_weights = true"), "n_weights: expected a whole number"),
        (TABLE.replace("Q4_K = 0.011", ""), "no figure for Q4_K"),
        (TABLE.replace("Q4_K = 0.011", "Q4_K = 0.0001"), "above the floor"),
        (TABLE.replace("ffn_down]", "ffn_sideways]"), "unknown role 'ffn_sideways'"),
        (TABLE.replace("Q3_K", "Q9_X"), "unknown format 'Q9_X'"),
        (TABLE.replace("floor", "ceiling"), "unknown key 'ceiling'"),
        (TABLE + TABLE[TABLE.index("[[measured]]") :], "two models of one size"),
    ],
)
def test_tables_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_sensitivity(text, "test")


def test_table_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(RecipeError, match="cannot be read"):
        read_sensitivity(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_sensitivity(path)
    path.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(RecipeError, match="larger than"):
        read_sensitivity(path)
    path.write_text(TABLE)
    assert read_sensitivity(path).source == "a test"


def test_types_without_a_figure_are_not_offered_and_not_explained() -> None:
    table = parse_sensitivity(TABLE.replace("Q3_K = 0.041\n", "").replace("Q8_0 = 0.0011\n", ""), "test")
    model = only(("token_embd", Role.EMBED, None), *((f"d{i}", Role.FFN_DOWN, i) for i in range(5)))
    offered = {option.formats for option in list_options(model, table.predict(model))}
    assert offered == {("Q4_K", "Q5_K", "Q6_K", "F16")}
    made = plan(model, Choice(target=Target(bits_per_weight=5.0), figures=table))
    assert {item.format.name for item in made.tensors} <= {"Q4_K", "Q5_K", "Q6_K"}
    with pytest.raises(RecipeError, match="no figure for Q8_0; it has F32 F16 BF16 Q4_K Q5_K Q6_K"):
        explain(plan(model, open_recipe("q8_0")), model, table)


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    "dimensions", [QWEN35_08B, QWEN35_4B, QWEN35_9B, QWEN35_35B_A3B], ids=["08B", "4B", "9B", "35B"]
)
def test_files_fill_their_target_and_never_exceed_it(dimensions: Dimensions) -> None:
    model = build_model(dimensions)
    n_weights, previous = sum(prod(tensor.shape) for tensor in model.tensors), float("inf")
    for bits in (3.6, 4.3, 4.6, 5.0, 5.69, 6.5, 8.0, 10.0, 15.9):
        target = int(n_weights * bits / 8)
        made = plan(model, Choice(target=Target(file_bytes=target)))
        assert 0.995 * target < made.file_bytes <= target, bits
        assert allocated(made).predicted_loss == allocated(made).least_loss < previous
        previous = allocated(made).predicted_loss


def test_bits_per_weight_are_the_plans_own() -> None:
    made = plan(build_model(QWEN35_4B), Choice(target=Target(bits_per_weight=4.8)))
    assert 4.8 * 0.999 < made.bits_per_weight <= 4.8
    assert allocated(made).fill == pytest.approx(made.bits_per_weight / 4.8)
    assert made.metadata["pocketquant.recipe"].value == "target-4.8bpw"


def test_less_is_lost_than_by_any_recipe_of_the_same_size() -> None:
    model, table = build_model(QWEN35_4B), read_sensitivity()
    for name in ("pocket_4bit", "q4_k_m", "q4_k_s", "q5_k_m", "q6_k"):
        planned = plan(model, open_recipe(name))
        made = plan(model, Choice(target=Target(file_bytes=planned.file_bytes), figures=table))
        assert allocated(made).predicted_loss < explain(planned, model, table).predicted_loss


def test_a_target_out_of_reach_names_the_range() -> None:
    model = build_model(Dimensions())
    with pytest.raises(RecipeError, match="cannot be reached") as caught:
        plan(model, Choice(target=Target(file_bytes=1000)))
    words = str(caught.value).replace(",", "").split()
    least, most = (int(words[i]) for i in (words.index("from") + 1, words.index("to") + 1))
    for nbytes in (least, most):
        assert plan(model, Choice(target=Target(file_bytes=nbytes))).file_bytes == nbytes
    for nbytes in (least - 1, int(most * 1.006)):
        with pytest.raises(RecipeError, match=f"{least:,} to {most:,} bytes"):
            plan(model, Choice(target=Target(file_bytes=nbytes)))
    for bits in (2.0, 17.0):
        with pytest.raises(RecipeError, match="bits per weight cannot be reached"):
            plan(model, Choice(target=Target(bits_per_weight=bits)))


@pytest.mark.parametrize("bits", [0.0, -1.0, float("nan"), float("inf"), 1e308])
def test_no_target_is_beyond_all_numbers(bits: float) -> None:
    with pytest.raises(RecipeError, match="must be above 0 and below"):
        Target(bits_per_weight=bits)


def test_slow_types_only_where_the_target_is_small() -> None:
    model = build_model(QWEN35_4B)
    for bits, has_q3_k in ((4.0, True), (4.5, True), (4.8, False), (5.7, False)):
        made = plan(model, Choice(target=Target(bits_per_weight=bits)))
        assert ("Q3_K" in {item.format.name for item in made.tensors}) is has_q3_k, bits


def test_where_a_target_stops_being_small_nothing_is_lost() -> None:
    model = build_model(QWEN35_4B)
    below, above = (allocated(plan(model, Choice(target=Target(bits_per_weight=bits)))) for bits in (4.745, 4.755))
    assert above.predicted_loss < below.predicted_loss


@pytest.mark.parametrize("arguments", [{}, {"file_bytes": 1, "bits_per_weight": 1.0}, {"bits_per_weight": -1.0}])
def test_half_a_target_is_none(arguments: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="target"):
        Target(**arguments)  # type: ignore[arg-type]


def test_rows_that_fit_no_k_quant_get_what_fits() -> None:
    model = build_model(Dimensions(n_embd=320, n_ff=512))
    odd = Tensor("blk.0.attn_gate.weight", Role.DELTA_GATE, 0, (8, 72), "F32", RandomRows("x", 72))
    model = replace(model, tensors=tuple(odd if tensor.name == odd.name else tensor for tensor in model.tensors))
    made = plan(model, Choice(target=Target(bits_per_weight=6.2)))
    types = {item.tensor.name: item.format.name for item in made.tensors}
    assert types[odd.name] == "F16"
    wide = {types[t.name] for t in model.tensors if not t.keep_f32 and t.n_cols % 256 == 0}
    narrow = {types[t.name] for t in model.tensors if not t.keep_f32 and t.n_cols == 320}
    assert wide <= {"Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16"}
    assert narrow <= {"IQ4_NL", "Q8_0", "F16"}
    assert "IQ4_NL" in narrow


def test_prediction_block_and_image_patches_keep_their_precision() -> None:
    base = build_model(Dimensions())
    extra = [
        Tensor("blk.4.ffn_down.weight", Role.FFN_DOWN, 4, (256, 512), "F32", RandomRows("m", 512)),
        Tensor("blk.4.nextn.eh_proj.weight", Role.MTP_JOIN, 4, (256, 512), "F32", RandomRows("j", 512)),
        Tensor("v.patch_embd.weight", Role.VISION_PATCH, None, (256, 256), "F32", RandomRows("v", 256)),
        Tensor("v.patch_embd.weight.1", Role.VISION_PATCH, None, (256, 256), "F32", RandomRows("w", 256)),
    ]
    model = replace(base, tensors=(*base.tensors, *extra))
    offered = {option.place: option.formats for option in list_options(model, read_sensitivity().predict(model))}
    assert offered[Role.FFN_DOWN, 4] == offered[Role.MTP_JOIN, 4] == ("Q5_K", "Q6_K", "Q8_0", "F16")
    assert offered[Role.VISION_PATCH, None] == ("F16",)
    assert offered[Role.FFN_DOWN, 3] == ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")
    made = plan(model, Choice(target=Target(bits_per_weight=6.0)))
    types = {item.tensor.name: item.format.name for item in made.tensors}
    assert types["v.patch_embd.weight"] == types["v.patch_embd.weight.1"] == "F16"
    assert types["blk.4.ffn_down.weight"] in ("Q5_K", "Q6_K", "Q8_0", "F16")


def test_a_prediction_block_is_offered_what_a_recipe_can_give_it() -> None:
    base = build_model(Dimensions())
    mtp = Tensor("blk.4.ffn_down.weight", Role.FFN_DOWN, 4, (256, 512), "F32", RandomRows("m", 512))
    model = replace(base, tensors=(*base.tensors, mtp))
    losses = {t.name: {name: 2.0**-i for i, name in enumerate(PREDICTED)} for t in model.tensors if not t.keep_f32}
    losses[mtp.name] |= {"Q4_1": 0.0}  # the best there is, and below what the block may have
    table = LossTable("test", fingerprint(model), losses)
    offered = {option.place: option.formats for option in list_options(model, table, "any")}
    assert offered[Role.FFN_DOWN, 4] == ("Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0", "F16")
    made = plan(model, Choice(target=Target(bits_per_weight=5.5), figures=table, device="any"))
    types = {item.tensor.name: item.format for item in made.tensors}
    assert types[mtp.name].bits_per_weight >= FORMATS["Q5_K"].bits_per_weight


def test_the_header_that_an_importance_matrix_adds_is_counted() -> None:
    model = build_model(Dimensions())
    weights = {t.name: np.ones(t.n_cols, np.float32) for t in model.tensors if t.role is Role.FFN_UP}
    matrix = Importance(weights, "a-rather-long-name-of-a-matrix.gguf", ("text",), 4)
    target = plan(model, Choice(target=Target(bits_per_weight=5.2), importance=matrix)).file_bytes
    for nbytes in range(target - 64, target + 64, 16):
        assert plan(model, Choice(target=Target(file_bytes=nbytes), importance=matrix)).file_bytes <= nbytes


def test_a_thousand_tensors_in_moments() -> None:
    model = build_model(Dimensions(n_layer=120))
    assert sum(not tensor.keep_f32 for tensor in model.tensors) > 900
    started = time.perf_counter()
    made = plan(model, Choice(target=Target(bits_per_weight=5.0)))
    assert allocated(made).predicted_loss == allocated(made).least_loss
    assert time.perf_counter() - started < 5  # 0.2 s on an idle core


# ---------------------------------------------------------------- explanations


def test_an_explanation_adds_up_and_its_changes_are_real() -> None:
    model, table = build_model(Dimensions(n_layer=8, n_v=4)), read_sensitivity()
    made = plan(model, Choice(target=Target(bits_per_weight=5.0), figures=table))
    explained = explain(made, model, table)
    assert explained.predicted_loss == pytest.approx(allocated(made).predicted_loss)
    assert sum(share.loss_share for share in explained.roles) == pytest.approx(1)
    decided = [item for item in made.tensors if not item.tensor.keep_f32]
    assert sum(share.nbytes for share in explained.roles) == sum(item.nbytes for item in decided)
    assert sum(share.n_weights for share in explained.roles) == sum(prod(item.tensor.shape) for item in decided)
    budget = 5.0 * sum(prod(tensor.shape) for tensor in model.tensors) / 8
    used = sum(padded(item.nbytes) for item in made.tensors)
    for share in explained.roles:
        assert sum(share.formats.values()) == sum(item.tensor.role.value == share.role for item in decided)
        for change in (share.cheaper, share.dearer):
            assert change is not None, share.role
            recipe = parse_recipe(
                format_recipe(recipe_of(made)).replace(
                    "[[rules]]", f"[[rules]]\n{_rule(share.role, change.layer, change.after)}\n[[rules]]", 1
                ),
                "changed",
            )
            changed = plan(model, recipe)
            assert changed.file_bytes == change.file_bytes == made.file_bytes + change.nbytes
            loss = explain(changed, model, table).predicted_loss
            assert loss - explained.predicted_loss == pytest.approx(change.loss)
            assert (change.nbytes < 0) == (change.loss > 0) == (change is share.cheaper)
        assert share.dearer is not None
        assert used + share.dearer.nbytes > budget, "a change that saves loss and fits was left out"


def _rule(role: str, layer: int | None, format: str) -> str:
    layers = "" if layer is None else f'layers = ["{layer}"]\n'
    return f'roles = ["{role}"]\n{layers}format = "{format}"\nreason = "changed"\n'


# ---------------------------------------------------------------- recipes as text and from files


@pytest.mark.parametrize("name", builtin_recipes())
def test_recipes_survive_being_written(name: str) -> None:
    recipe = open_recipe(name)
    assert parse_recipe(format_recipe(recipe), "text") == recipe


def test_awkward_text_survives_being_written() -> None:
    recipe = replace(open_recipe("q4_k_m"), description='a "quoted" \\ back\x7f\tslash é \U0001f600 \x01')
    assert parse_recipe(format_recipe(recipe), "text") == recipe


@pytest.mark.parametrize("recipe", ["pocket_4bit", "q4_k_m", "q5_k_s", "iq4_nl", "f32"])
def test_the_types_of_another_file(recipe: str, tmp_path: Path) -> None:
    model = build_model(Dimensions(n_layer=8, n_embd=320 if recipe == "q5_k_s" else 256))
    made = plan(model, open_recipe(recipe))
    path = tmp_path / "Some Model-Q4.gguf"
    write(made, path)
    found = open_recipe(f"from:{path}")
    assert found.name == "from-some_model-q4"
    assert parse_recipe(format_recipe(found), "text") == found
    again = plan(model, found)
    assert [item.format for item in again.tensors] == [item.format for item in made.tensors]
    assert found.file_type == made.metadata["general.file_type"].value


def test_types_of_a_target_are_kept_by_its_recipe(tmp_path: Path) -> None:
    model = build_model(Dimensions(n_layer=8))
    made = plan(model, Choice(target=Target(bits_per_weight=5.3)))
    again = plan(model, parse_recipe(format_recipe(recipe_of(made)), "text"))
    assert [item.format for item in again.tensors] == [item.format for item in made.tensors]
    assert again.header == made.header


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    model = build_model(Dimensions())
    only_norms = replace(model, tensors=tuple(tensor for tensor in model.tensors if tensor.keep_f32))
    path = tmp_path / "norms.gguf"
    write(plan(only_norms, open_recipe("f32")), path)
    with pytest.raises(ArchitectureError, match=r"missing[\s\S]*token_embd"):
        open_recipe(f"from:{path}")
    with pytest.raises(SourceError, match="cannot be read"):
        open_recipe(f"from:{tmp_path / 'nothing.gguf'}")
    path.write_text("name = 'a recipe, not a GGUF'")
    with pytest.raises(SourceError, match="no GGUF"):
        open_recipe(f"from:{path}")


def test_a_recipe_that_cannot_give_the_types_says_so() -> None:
    model = build_model(Dimensions())
    types = {(t.role, t.layer): FORMATS["Q4_K"] for t in model.tensors if not t.keep_f32}
    types[Role.ATTN_V, 3] = FORMATS["Q8_0"]
    with pytest.raises(RecipeError, match=r"blk\.3\.attn_v\.weight: Q8_0 became Q4_K \(default of q\)"):
        check_types(model, parse_recipe('name="q"\ndescription="q"\nfile_type=1\ndefault="Q4_K"', "q"), types)
