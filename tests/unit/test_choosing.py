"""A choice as one value: what it decides, what a recipe is short for, and what tells plans apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from statistics_maker import make_statistics

from pocketquant import open_model
from pocketquant.calibration.statistics import open_statistics
from pocketquant.errors import RecipeError
from pocketquant.gguf_file.shards import split_plan
from pocketquant.gguf_file.writing import write
from pocketquant.model import Model, Plan
from pocketquant.quant import Choice, Importance, Target, format_recipe, open_recipe, parse_recipe, plan, with_figures
from pocketquant.quant.loss_table import LossTable
from pocketquant.release.planning import plan_release


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return open_model(checkpoint)


@pytest.fixture(scope="module")
def sized(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Choice:
    """The default recipe with statistics, and what those predict."""
    statistics = open_statistics(make_statistics(model, tmp_path_factory.mktemp("stats") / "a.stats", n_group=2))
    return with_figures(model, Choice(statistics=statistics, steps="search"))


def importance_of(model: Model, value: float = 1.0) -> Importance:
    weights = {t.name: np.full(t.n_cols, value, np.float32) for t in model.tensors if t.name.endswith("ffn_up.weight")}
    return Importance(weights, "a.gguf", ("text",), 4)


def types_of(planned: Plan) -> list[str]:
    return [item.format.name for item in planned.tensors]


def test_a_recipe_is_short_for_a_choice(model: Model) -> None:
    matrix, recipe = importance_of(model), open_recipe("q4_k_m")
    whole, short = plan(model, Choice(recipe, importance=matrix)), plan(model, recipe, matrix)
    assert whole.header == short.header
    assert whole.digest == short.digest
    assert whole.allocation is None
    assert plan(model, Choice()).metadata["pocketquant.recipe"].value == "pocket_4bit"


def test_statistics_choose_better_types_within_the_bytes_of_a_recipe_that_is_a_size(
    model: Model, sized: Choice
) -> None:
    own, kept, chosen = (plan(model, one) for one in (Choice(), replace(sized, keep_types=True), sized))
    assert types_of(own) == types_of(kept) != types_of(chosen)
    assert chosen.allocation is not None
    assert 0.99 < chosen.allocation.fill <= 1
    assert chosen.file_bytes <= kept.file_bytes
    assert chosen.metadata["pocketquant.recipe"].value == "pocket_4bit"
    assert chosen.rounding


def test_an_edited_copy_of_such_a_recipe_keeps_its_types(model: Model, sized: Choice) -> None:
    text = format_recipe(open_recipe("pocket_4bit"))
    same, edited = parse_recipe(text, "copy"), parse_recipe(text.replace('"Q4_K"', '"Q5_K"'), "copy")
    assert edited != same
    assert replace(sized, recipe=same).is_allocated
    assert not replace(sized, recipe=edited).is_allocated
    assert types_of(plan(model, replace(sized, recipe=edited))) == types_of(plan(model, edited))


def test_steps_that_are_none_round_nothing_by_statistics(model: Model, sized: Choice) -> None:
    planned = plan(model, replace(sized, steps="none", figures=None))
    assert planned.allocation is not None
    assert not planned.rounding
    assert "pocketquant.rounding" not in planned.metadata
    with pytest.raises(RecipeError, match="guess: no steps of rounding; there are none, search"):
        replace(sized, steps="guess")


def test_one_prediction_serves_all_sizes(checkpoint: Path, sized: Choice) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    said: list[tuple[int, int]] = []
    asked = [replace(sized, figures=None), replace(sized, figures=None, target=Target(bits_per_weight=6.0)), "q4_0"]
    release = plan_release(checkpoint, asked, progress=lambda done, total: said.append((done, total)))
    assert [done for done, _ in said] == list(range(1, said[0][1] + 1))
    first, second, plain = (variant.choice.figures for variant in release.variants)
    assert isinstance(first, LossTable)
    assert first is second
    assert plain is None


# ---------------------------------------------------------------- digests


def test_plans_of_equal_files_have_one_digest(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    for choice in (Choice(), Choice(open_recipe("q8_0"), importance=importance_of(model))):
        assert plan(open_model(copy), choice).digest == plan(model, choice).digest


def test_whatever_shapes_the_bytes_changes_the_digest(
    checkpoint: Path, model: Model, sized: Choice, tmp_path: Path
) -> None:
    other = open_statistics(make_statistics(model, tmp_path / "a.stats", n_group=2, salt="other"))
    recipe = open_recipe("q4_k_m")
    choices = [
        Choice(recipe),
        Choice(open_recipe("q4_k_s")),
        Choice(recipe, importance=importance_of(model)),
        Choice(recipe, importance=importance_of(model, 2.0)),
        Choice(recipe, statistics=sized.statistics),
        Choice(recipe, statistics=other),
        Choice(recipe, statistics=sized.statistics, steps="feedback"),
    ]
    plans = [plan(model, choice) for choice in choices]
    assert plans[4].header == plans[5].header, "other statistics of a text of the same name"
    digests = [planned.digest for planned in plans]
    changed = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    weights = changed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-8] ^= 1
    weights.write_bytes(data)
    digests.append(plan(open_model(changed), recipe).digest)
    assert len(set(digests)) == len(digests)


def test_a_repository_is_told_by_its_addresses(model: Model) -> None:
    remote = [replace(model, files=(), origin=(f"hf://org/name@main commit={commit}",)) for commit in "ab"]
    first, other = (plan(one, open_recipe("q8_0")).digest for one in remote)
    assert first != other


def test_shards_know_what_they_are_made_from(model: Model, demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_model(demo_gguf("f32"))
    whole = plan(source, open_recipe("q8_0"))
    shards = split_plan(whole, tmp_path / "a.gguf", 1 << 20)
    assert len(shards) > 1
    assert {shard.files for shard, _ in shards} == {whole.files}
    write(*shards[0])
    assert shards[0][1].stat().st_size == shards[0][0].file_bytes
