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
        (None, [True, True, True, False]),
    ],
)
def test_recurrent_layers_are_written_given_or_not(
    types: list[str] | None, expected: list[bool], tmp_path: Path
) -> None:
    weights = weights_for(text_config(layer_types=types))
    metadata = open_model(make_checkpoint(tmp_path / "c", weights=weights, layer_types=types)).metadata
    assert metadata["qwen35.attention.recurrent_layers"] == Value("bool[]", expected)


def test_all_of_yarn_is_written(tmp_path: Path) -> None:
    rope = {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.9,
        "beta_fast": 16,
        "beta_slow": 2,
    }
    rope |= {**text_config()["rope_parameters"], "rope_type": "yarn"}
    metadata = open_model(make_checkpoint(tmp_path / "c", rope_parameters=rope)).metadata
    found = {key.rpartition(".yarn_")[2]: value.value for key, value in metadata.items() if ".yarn_" in key}
    assert found == {"attn_factor": 0.9, "beta_fast": 16.0, "beta_slow": 2.0}


@pytest.mark.parametrize("key", ["attention_factor", "beta_fast", "beta_slow", "extrapolation_factor"])
@pytest.mark.parametrize("value", [float("nan"), -1, "x", True])
def test_yarn_of_nonsense_is_refused(key: str, value: object, tmp_path: Path) -> None:
    rope = {**text_config()["rope_parameters"], "rope_type": "yarn", "factor": 4.0, key: value}
    folder = make_checkpoint(tmp_path / "c", weights=weights_for(text_config()), rope_parameters=rope)
    with pytest.raises(ArchitectureError, match=f"{key}: .*expected a number above 0"):
        open_model(folder)


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
