"""Keys that llama.cpp's converter writes as of llama-cpp-python 0.3.36 (tests/peers compares whole files)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_maker import make_checkpoint, mtp_weights_for, text_config, weights_for

from pocketquant import open_model
from pocketquant.errors import ArchitectureError
from pocketquant.model import Value


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (["linear_attention"] * 3 + ["full_attention"], [True, True, True, False]),
        (["full_attention", "linear_attention", "full_attention", "linear_attention"], [False, True, False, True]),
        (None, None),
    ],
)
def test_recurrent_layers_are_written_wherever_layer_types_is_given(
    types: list[str] | None, expected: list[bool] | None, tmp_path: Path
) -> None:
    weights = weights_for(text_config(layer_types=types))
    metadata = open_model(make_checkpoint(tmp_path / "c", weights=weights, layer_types=types)).metadata
    assert metadata.get("qwen35.attention.recurrent_layers") == (expected and Value("bool[]", expected))


def test_the_embedded_mtp_block_is_not_recurrent(tmp_path: Path) -> None:
    weights = weights_for(text_config()) | mtp_weights_for(text_config())
    model = open_model(make_checkpoint(tmp_path / "c", weights=weights, mtp_num_hidden_layers=1), mtp="embed")
    assert model.metadata["qwen35.attention.recurrent_layers"].value == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"repetition_penalty": 1.05}, 1.05),
        ({"penalty_repeat": 1.1, "repetition_penalty": 1.05}, 1.1),
        ({"repetition_penalty": 1}, 1.0),
        ({"top_k": 20}, None),
    ],
)
def test_the_repetition_penalty_is_a_sampling_default(
    generation: dict[str, float], expected: float | None, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "c")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    found = open_model(folder).metadata.get("general.sampling.penalty_repeat")
    assert found == (expected and Value("f32", expected))


@pytest.mark.parametrize("gate", ["swish", "silu", None])
def test_a_silu_output_gate_is_what_the_runtimes_compute(gate: str | None, tmp_path: Path) -> None:
    assert open_model(make_checkpoint(tmp_path / "c", output_gate_type=gate)).architecture == "qwen35"


def test_another_output_gate_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=weights_for(text_config()), output_gate_type="sigmoid")
    with pytest.raises(ArchitectureError, match=r"output_gate_type 'sigmoid': llama.cpp computes silu"):
        open_model(folder)
