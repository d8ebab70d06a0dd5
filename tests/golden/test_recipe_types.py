"""recipe x model -> the format of every tensor, and the size of the data, as reviewed.

A change of a recipe shows here as a diff. To refresh on purpose: `python tests/golden/test_recipe_types.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qwen35_inventory import QWEN35_08B, QWEN35_4B, QWEN35_9B, QWEN35_35B_A3B, Dimensions, build_model

from pocketquant.quant import builtin_recipes, choose_formats, open_recipe

GOLDEN = Path(__file__).with_name("recipe_types.json")
SHAPES = {"0.8B": QWEN35_08B, "4B": QWEN35_4B, "9B": QWEN35_9B, "35B-A3B": QWEN35_35B_A3B}


def type_table(shape: Dimensions, recipe_name: str, has_importance: bool) -> dict[str, object]:
    """Role -> {format: layers}, without the tensors that are F32 everywhere; and the bytes of all tensors."""
    table: dict[str, dict[str, list[int]]] = {}
    nbytes = 0
    for tensor, format, _ in choose_formats(build_model(shape), open_recipe(recipe_name), has_importance):
        nbytes += tensor.n_rows * format.row_bytes(tensor.n_cols)
        if not tensor.keep_f32:
            layers = table.setdefault(tensor.role.value, {}).setdefault(format.name, [])
            if tensor.layer is not None:
                layers.append(tensor.layer)
    spelled = {role: {name: _spell(layers) for name, layers in formats.items()} for role, formats in table.items()}
    return {"nbytes": nbytes, **{role: spelled[role] for role in sorted(spelled)}}


def _spell(layers: list[int]) -> str:
    return " ".join(str(layer) for layer in layers)


def all_tables() -> dict[str, object]:
    tables: dict[str, object] = {}
    for shape_name, shape in SHAPES.items():
        for recipe_name in builtin_recipes():
            plain, weighted = (type_table(shape, recipe_name, flag) for flag in (False, True))
            tables[f"{shape_name} {recipe_name}"] = plain
            if weighted != plain:
                tables[f"{shape_name} {recipe_name} with importance"] = weighted
    return tables


@pytest.mark.parametrize("shape_name", SHAPES)
def test_types_are_as_reviewed(shape_name: str) -> None:
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = all_tables()
    assert found.keys() == expected.keys()
    for key in (key for key in expected if key.startswith(shape_name + " ")):
        assert found[key] == expected[key], key


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(all_tables(), indent=1) + "\n", encoding="utf-8")
