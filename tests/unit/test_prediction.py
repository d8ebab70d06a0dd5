"""Predicted losses are what their definition says, and a choice of types made by them is the least of their sums."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moe_checkpoint import golden_checkpoint
from statistics_maker import make_statistics

from pocketquant import open_model, open_recipe, plan
from pocketquant.calibration.statistics import (
    COUNT,
    EMBED_OUTPUT,
    HEAD,
    HEAD_ROUNDING,
    INPUT,
    OUTPUT,
    ROUNDING,
    fingerprint,
    open_statistics,
)
from pocketquant.calibration.statistics_writing import About, triangles, write_statistics
from pocketquant.errors import RecipeError
from pocketquant.formats import FORMATS
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.model import Model, Role, Tensor
from pocketquant.quant.allocation import list_options
from pocketquant.quant.choosing import Choice, Target
from pocketquant.quant.explain import explain
from pocketquant.quant.loss_table import SCHEMA, LossTable, parse_losses, read_figures, write_losses
from pocketquant.quant.measuring import list_groups
from pocketquant.quant.prediction import PREDICTED, PredictSettings, predict_losses
from pocketquant.quant.rounding.encoding import STEPS, with_rounding
from pocketquant.quant.sensitivity import Sensitivity, read_sensitivity
from pocketquant.texts.corpus import TextRecord

FINE = {"IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
UP, GATE, EMBED = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight", "token_embd.weight"


def moment_of(k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    samples = (rng.standard_normal((2 * k, k // 4)) @ rng.standard_normal((k // 4, k))) * rng.lognormal(0.0, 1.0, k)
    return (samples.T @ samples / len(samples)).astype(np.float32)


@pytest.fixture
def model(demo_gguf: Callable[[str], Path]) -> Model:
    return open_gguf(demo_gguf("f32"))


@pytest.fixture
def statistics(tmp_path: Path, model: Model) -> Path:
    """One layer with inputs and outputs, one that shares its inputs, and the tied head with two groups of rows."""
    layout, pieces = {}, []
    tensors = {tensor.name: tensor for tensor in model.tensors}
    up, embed = tensors[UP], tensors[EMBED]
    sides = {UP + INPUT: up.n_cols, UP + OUTPUT: up.n_rows, EMBED_OUTPUT: embed.n_cols}
    for seed, (name, side) in enumerate(sides.items()):
        layout[name], layout[name + COUNT] = triangles(1, side), ("I64", (1,))
        pieces += [(name, 0, moment_of(side, seed)), (name + COUNT, None, np.array([99]))]
    rng = np.random.default_rng(7)
    vectors = {
        HEAD[0]: (np.arange(embed.n_rows) % 2).astype(np.int32),
        HEAD[1]: rng.random(embed.n_rows) + 0.1,
        HEAD[2]: rng.dirichlet(np.ones(embed.n_rows)),
    }
    for name, vector in vectors.items():
        layout[name] = ("I32" if vector.dtype == np.int32 else "F64", vector.shape)
        pieces.append((name, None, vector))
    layout[HEAD[3]], layout[HEAD[3] + COUNT] = triangles(2, embed.n_cols), ("I64", (2,))
    pieces += [(HEAD[3], i, moment_of(embed.n_cols, 20 + i) * (1 + i)) for i in range(2)]
    pieces.append((HEAD[3] + COUNT, None, np.array([99, 99])))
    for name, k in ((UP + ROUNDING, up.n_cols), (HEAD_ROUNDING, embed.n_cols)):
        layout[name] = ("F32", (1, 2 * k))
        pieces.append((name, 0, 1e-4 * (np.repeat([2, 1], k) + rng.random(2 * k))))
    path = tmp_path / "made.stats"
    about = About(99, fingerprint(model), (TextRecord("a.txt", 99, "0" * 64),), {GATE: UP})
    write_statistics(path, about, layout, pieces)
    return path


def find(model: Model, name: str) -> Tensor:
    return next(tensor for tensor in model.tensors if tensor.name == name)


def error_of(tensor: Tensor, name: str) -> np.ndarray:
    rows = tensor.rows(0, tensor.n_rows)
    return FORMATS[name].decode(FORMATS[name].encode(rows), tensor.n_cols).astype(np.float64) - rows


@pytest.mark.parametrize("name", ["Q3_K", "IQ4_XS", "Q8_0"])
def test_both_sides_known_the_loss_is_half_the_trace(name: str, model: Model, statistics: Path) -> None:
    opened = open_statistics(statistics)
    table = predict_losses(model, opened, PredictSettings(rounding=None))
    d, h, g = error_of(find(model, UP), name), opened.input(UP), opened.output(UP)
    assert table.loss(find(model, UP), name) == pytest.approx(
        0.5 * np.einsum("ab,bi,ij,aj->", g, d, h, d, optimize=True)
    )


def test_rows_of_a_tied_embedding_cost_what_head_and_frequency_say(model: Model, statistics: Path) -> None:
    opened = open_statistics(statistics)
    head, d = opened.head(), error_of(find(model, EMBED), "Q4_K")
    assert head is not None
    of_head = [head.row_scale[v] * d[v] @ head.hessian(v % 2) @ d[v] for v in range(len(d))]
    of_embedding = head.frequency * np.einsum("vi,ij,vj->v", d, head.embed_output, d, optimize=True)
    expected = 0.5 * (sum(of_head) + of_embedding.sum())
    table = predict_losses(model, opened, PredictSettings(rounding=None))
    assert table.loss(find(model, EMBED), "Q4_K") == pytest.approx(expected, rel=1e-5)
    blind = predict_losses(model, opened, PredictSettings(rounding=None, use_gradients=False))
    assert blind.loss(find(model, EMBED), "Q4_K") == pytest.approx(0.5 * sum(of_head), rel=1e-5)


def test_without_gradients_sensitivities_set_the_level_and_inputs_the_ratios(model: Model, statistics: Path) -> None:
    opened, gate = open_statistics(statistics), find(model, GATE)
    prior = read_sensitivity().predict(model)
    table = predict_losses(model, opened, PredictSettings(rounding=None))
    assert table.loss(gate, "Q4_K") == pytest.approx(prior.loss(gate, "Q4_K"))
    h = opened.input(UP)
    lost = {
        name: float(np.einsum("ai,ij,aj->", d, h, d, optimize=True))
        for name in ("Q4_K", "Q6_K")
        for d in [error_of(gate, name)]
    }
    ratio = table.loss(gate, "Q6_K") / table.loss(gate, "Q4_K")
    assert ratio == pytest.approx(lost["Q6_K"] / lost["Q4_K"], rel=1e-5)
    unknown = find(model, "blk.1.ffn_up.weight")  # nothing known of its inputs: every column alike
    assert table.loss(unknown, "Q4_K") == pytest.approx(prior.loss(unknown, "Q4_K"))


def test_the_error_is_the_rounders_own(model: Model, statistics: Path) -> None:
    opened, up = open_statistics(statistics), find(model, UP)
    h, g = opened.input(UP), opened.output(UP)
    encoder = with_rounding(plan(model, open_recipe("q4_k_m")), opened).rounding[UP]
    rows = up.rows(0, up.n_rows)
    thorough = predict_losses(model, opened, PredictSettings(formats=("Q4_K", "Q6_K"), thorough=True))
    quick = predict_losses(model, opened, PredictSettings(formats=("Q4_K", "Q6_K")))
    plain = predict_losses(model, opened, PredictSettings(formats=("Q4_K", "Q6_K"), rounding=None))
    for name in ("Q4_K", "Q6_K"):
        d = FORMATS[name].decode(encoder.encode(up, 0, up.n_rows, FORMATS[name]), up.n_cols).astype(np.float64) - rows
        exact = 0.5 * np.einsum("ab,bi,ij,aj->", g, d, h, d, optimize=True)
        assert thorough.loss(up, name) == pytest.approx(exact, rel=1e-4)
        assert exact < 0.8 * plain.loss(up, name)
        assert quick.loss(up, name) == pytest.approx(exact, rel=0.15)
    assert quick.loss(up, "Q4_K") == pytest.approx(thorough.loss(up, "Q4_K"))


def added_by_kernels(model: Model, statistics: Path, tensor: Tensor, **options: bool) -> dict[str, float]:
    opened = open_statistics(statistics)
    bare, whole = (
        predict_losses(model, opened, PredictSettings(rounding=None, activations=flag, **options)).losses[tensor.name]
        for flag in (False, True)
    )
    return {name: whole[name] - bare[name] for name in PREDICTED}


def check_added(added: dict[str, float], coarse: float, fine: float) -> None:
    for name, value in added.items():
        assert value == pytest.approx(fine if name in FINE else coarse, rel=1e-4), name


def test_kernels_lose_half_of_what_inputs_lose_times_weights_and_gradients(model: Model, statistics: Path) -> None:
    opened, up = open_statistics(statistics), find(model, UP)
    w, g, v = up.rows(0, up.n_rows).astype(np.float64), opened.output(UP), opened.rounding(UP)
    assert g is not None
    coarse, fine = 0.5 * v @ np.einsum("aj,ab,bj->j", w, g, w, optimize=True)
    assert 0 < fine < 0.8 * coarse
    check_added(added_by_kernels(model, statistics, up), coarse, fine)


def test_kernels_beside_the_head_lose_by_its_rows_own_shares(model: Model, statistics: Path) -> None:
    opened, embed = open_statistics(statistics), find(model, EMBED)
    w, p = embed.rows(0, embed.n_rows).astype(np.float64), opened.array(HEAD[1])
    coarse, fine = 0.5 * opened.head_rounding() @ (p @ w**2)
    check_added(added_by_kernels(model, statistics, embed), coarse, fine)
    check_added(added_by_kernels(model, statistics, embed, use_gradients=False), coarse, fine)


def test_kernels_without_gradients_count_in_units_of_plain_q4_k(model: Model, statistics: Path) -> None:
    opened, gate = open_statistics(statistics), find(model, GATE)  # shares its inputs, has no gradients
    w, h, v = gate.rows(0, gate.n_rows).astype(np.float64), opened.input(GATE), opened.rounding(GATE)
    d = error_of(gate, "Q4_K")
    level = read_sensitivity().predict(model).loss(gate, "Q4_K") / np.einsum("ai,ij,aj->", d, h, d, optimize=True)
    coarse, fine = level * (v @ np.square(w).sum(axis=0))
    check_added(added_by_kernels(model, statistics, gate), coarse, fine)
    check_added(added_by_kernels(model, statistics, find(model, "blk.1.ffn_up.weight")), 0.0, 0.0)  # nothing known


def test_each_expert_adds_by_its_tokens_and_an_unseen_one_nothing(tmp_path: Path) -> None:
    name, outputs = "blk.0.ffn_down_exps.weight", ("blk.0.ffn_down_exps.weight",)
    model = open_model(golden_checkpoint(tmp_path / "moe"))
    tensor = find(model, name)
    n_expert, rows, kinds = tensor.shape[0], tensor.shape[1], ("IQ4_NL", "Q4_K", "Q5_1", "Q8_0")
    for known in ((), outputs):
        path = make_statistics(model, tmp_path / f"s{len(known)}", outputs=known, unseen=[(name, 1)])
        opened = open_statistics(path)
        level, expected = 1.0, np.zeros(2)
        if not known:
            base = next(base for base in ("Q4_K", "IQ4_NL", "Q8_0") if tensor.n_cols % FORMATS[base].block_len == 0)
            level = 0.0
            for expert in range(n_expert):
                h = opened.input(name, expert)
                if h is not None:
                    d = error_of(tensor, base)[expert * rows : (expert + 1) * rows]
                    level += opened.share(name, expert) * float(np.einsum("ai,ij,aj->", d, h, d, optimize=True))
            level = read_sensitivity().predict(model).loss(tensor, base) / level
        for expert in [expert for expert in range(n_expert) if expert != 1]:
            w = tensor.rows(expert * rows, (expert + 1) * rows).astype(np.float64)
            g = opened.output(name, expert) if known else None
            by_column = (
                np.square(w).sum(axis=0) if g is None else 0.5 * np.einsum("aj,ab,bj->j", w, g, w, optimize=True)
            )
            share = 1.0 if known else opened.share(name, expert)
            expected += level * share * (opened.rounding(name, expert) @ by_column)
        bare, whole = (
            predict_losses(model, opened, PredictSettings(rounding=None, formats=kinds, activations=flag)).losses[name]
            for flag in (False, True)
        )
        for kind, value in whole.items():
            assert value - bare[kind] == pytest.approx(expected[1 if kind in FINE else 0], rel=1e-3), kind
        assert opened.input(name, 1) is None


def test_a_target_takes_the_table_and_says_its_sum(model: Model, statistics: Path) -> None:
    table = predict_losses(model, open_statistics(statistics), PredictSettings(rounding=STEPS["search"]))
    size = plan(model, open_recipe("q4_k_m")).file_bytes
    made = plan(model, Choice(target=Target(size), figures=table))
    assert made.file_bytes <= size
    total = sum(table.loss(item.tensor, item.format.name) for item in made.tensors)
    assert made.allocation is not None
    assert made.allocation.predicted_loss == pytest.approx(total)
    assert explain(made, model, table).predicted_loss == pytest.approx(total)
    recipe = plan(model, open_recipe("q4_k_m"))
    assert total < sum(table.loss(item.tensor, item.format.name) for item in recipe.tensors)


def test_devices_decide_what_is_on_offer(model: Model, statistics: Path) -> None:
    table = predict_losses(model, open_statistics(statistics), PredictSettings(rounding=None))
    offered = {
        device: {n for o in list_options(model, table, device) for n in o.formats} for device in ("phone", "any")
    }
    assert offered["any"] - offered["phone"] == {"IQ4_XS", "Q4_1", "Q5_0", "Q5_1"}
    assert "IQ4_NL" in offered["phone"]
    with pytest.raises(RecipeError, match="phone, any"):
        list_options(model, table, "toaster")


def test_where_activations_matter_a_scale_for_32_columns_wins(model: Model) -> None:
    weights = {"Q3_K": 9.0, "IQ4_XS": 4.0, "IQ4_NL": 4.1, "Q4_K": 3.9, "Q4_1": 3.0, "Q5_0": 1.3, "Q5_K": 1.0}
    weights |= {"Q5_1": 0.9, "Q6_K": 0.3, "Q8_0": 0.02}
    kernels = {name: 0.1 if name in FINE else 1.0 for name in weights}
    names = [tensor.name for tensor in model.tensors if not tensor.keep_f32]

    def types(device: str, *, counted: bool) -> set[str]:
        losses = {name: weights[name] + kernels[name] * counted for name in weights}
        table = LossTable("made up", fingerprint(model), dict.fromkeys(names, losses))
        made = plan(model, Choice(target=Target(bits_per_weight=5.9), figures=table, device=device))
        total = sum(table.loss(item.tensor, item.format.name) for item in made.tensors)
        assert made.allocation is not None
        assert made.allocation.predicted_loss == pytest.approx(total)
        return {item.format.name for item in made.tensors if not item.tensor.keep_f32}

    assert types("any", counted=True) & {"Q5_0", "Q5_1"}
    assert not types("any", counted=True) & {"Q5_K", "Q6_K"}
    assert not types("any", counted=False) & {"Q5_0"}
    for counted in (False, True):
        assert types("phone", counted=counted) <= {"IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16"}


def test_tables_survive_being_written(model: Model, statistics: Path, tmp_path: Path) -> None:
    table = replace(predict_losses(model, open_statistics(statistics)), multipliers={Role.FFN_UP: 3.0})
    write_losses(table, tmp_path / "t.json")
    read = read_figures(tmp_path / "t.json")
    assert isinstance(read, LossTable)
    assert read == table
    assert read.loss(find(model, UP), "Q4_K") == pytest.approx(3 * table.losses[UP]["Q4_K"])
    assert set(table.losses[UP]) == set(PREDICTED)
    assert isinstance(read_figures(None), Sensitivity)


def test_tables_of_another_model_are_refused(model: Model, statistics: Path, checkpoint: Path) -> None:
    table = predict_losses(model, open_statistics(statistics), PredictSettings(rounding=None, formats=("Q4_K", "Q8_0")))
    with pytest.raises(RecipeError, match="another model"):
        plan(open_model(checkpoint), Choice(target=Target(bits_per_weight=5.0), figures=table))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "no table"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"losses": {}}, "no figures"),
        ({"losses": {"a": {"Q9": 1.0}}}, "unknown format 'Q9'"),
        ({"losses": {"a": {"Q4_K": -1.0}}}, "a.Q4_K"),
        ({"losses": {"a": {"Q4_K": float("nan")}}}, "a.Q4_K"),
        ({"losses": {"a": 5}}, "a: expected"),
        ({"multipliers": {"nose": 1.0}}, "multipliers"),
        ({"source": 3}, "source: missing"),
    ],
)
def test_tables_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    good = {"schema": SCHEMA, "source": "x", "model_sha256": "0", "losses": {"a": {"Q4_K": 0.1}}}
    assert parse_losses(json.dumps(good), "good").losses == {"a": {"Q4_K": 0.1}}
    with pytest.raises(RecipeError, match=message):
        parse_losses(json.dumps(good | change), "bad")


def test_groups_are_every_tensor_once(model: Model) -> None:
    weights = {tensor.name for tensor in model.tensors if not tensor.keep_f32}
    for n_groups in (1, 2, 3, None):
        groups = list_groups(model, n_groups)
        names = [tensor.name for group in groups for tensor in group.tensors]
        assert sorted(names) == sorted(weights)
        of_down = [group.layers for group in groups if group.role is Role.FFN_DOWN]
        assert (
            of_down
            == {1: [(0, 1, 2, 3)], 2: [(0,), (1, 2, 3)], 3: [(0,), (1, 2), (3,)], None: [(0,), (1,), (2,), (3,)]}[
                n_groups
            ]
        )
