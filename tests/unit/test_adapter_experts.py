"""LoRA on experts: fused or one by one, in the adapter and in the checkpoint, merged and as a GGUF adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_maker import expert_factors, rows_of, write_expert_adapter
from checkpoint_maker import make_checkpoint, moe_config, one_by_one, weights_for

from pocketquant import open_model
from pocketquant.convert.adapter import open_adapter
from pocketquant.convert.adapter_gguf import plan_adapter
from pocketquant.errors import SourceError

CONFIG = moe_config()
FACTORS = expert_factors(CONFIG, rank=3)
ALPHA = 6
VERSIONS = {"fused": "0.21.2", "swapped": "0.18.1", "one by one": "0.17.1"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model with its experts in either layout."""
    weights, folder = weights_for(CONFIG), tmp_path_factory.mktemp("bases")
    return {
        layout: make_checkpoint(folder / layout.replace(" ", "-"), dtype="F32", weights=changed, **CONFIG)
        for layout, changed in (("fused", weights), ("one by one", one_by_one(weights)))
    }


def expected(base: Path, only: tuple[int, ...] | None = None) -> dict[str, np.ndarray]:
    """GGUF name -> f64 rows of every changed tensor, from the definition: W + alpha / rank * B @ A for each expert."""
    model, result = open_model(base), {}
    for (layer, parameter), (a, b) in FACTORS.items():
        n_expert, rank, cols = a.shape
        change = ALPHA / rank * np.einsum("eor,eri->eoi", b.astype(np.float64), a.astype(np.float64))
        if only is not None:
            change[[e for e in range(n_expert) if e not in only]] = 0
        names = ("ffn_gate_exps", "ffn_up_exps") if parameter == "gate_up_proj" else ("ffn_down_exps",)
        for name, part in zip(names, np.split(change, len(names), axis=1), strict=True):
            full = f"blk.{layer}.{name}.weight"
            result[full] = rows_of(model, full).astype(np.float64) + part.reshape(-1, cols)
    return result


@pytest.mark.parametrize("base", ["fused", "one by one"])
@pytest.mark.parametrize("layout", VERSIONS)
def test_breaks_today_08_experts_are_merged_in_every_layout(
    layout: str, base: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = {"lora_alpha": ALPHA, "peft_version": VERSIONS[layout]}
    folder = write_expert_adapter(tmp_path / "lora", FACTORS, layout, **config)
    merged = open_model(bases[base], adapter=folder)
    for name, values in expected(bases[base]).items():
        np.testing.assert_allclose(rows_of(merged, name), values, rtol=0, atol=1e-6, err_msg=name)
    name = "blk.1.ffn_down_exps.weight"  # chunks that begin and end within an expert give the same numbers
    tensor = next(tensor for tensor in merged.tensors if tensor.name == name)
    pieces = [tensor.rows(start, min(start + 100, tensor.n_rows)) for start in range(0, tensor.n_rows, 100)]
    assert np.array_equal(np.concatenate(pieces), rows_of(merged, name))


@pytest.mark.parametrize("base", ["fused", "one by one"])
def test_experts_that_were_not_trained_stay(base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = write_expert_adapter(tmp_path / "lora", FACTORS, "one by one", only=(1, 4), lora_alpha=ALPHA)
    merged = open_model(bases[base], adapter=folder)
    for name, values in expected(bases[base], only=(1, 4)).items():
        np.testing.assert_allclose(rows_of(merged, name), values, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("layout", VERSIONS)
def test_gguf_adapter_of_experts_is_the_change(layout: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """B @ A of every expert's pair, scaled as llama.cpp scales it, is what merging adds."""
    config = {"lora_alpha": ALPHA, "peft_version": VERSIONS[layout]}
    folder = write_expert_adapter(tmp_path / "lora", FACTORS, layout, **config)
    planned = plan_adapter(open_adapter(folder), open_model(bases["fused"]))
    tensors = {item.tensor.name: item.tensor for item in planned.tensors}
    alpha = planned.metadata["adapter.lora.alpha"].value
    for name, values in expected(bases["fused"]).items():
        a, b = (tensors[f"{name}.lora_{which}"] for which in "ab")
        assert a.shape[:2] == (6, 3)
        left, right = (t.rows(0, t.n_rows).reshape(t.shape).astype(np.float64) for t in (b, a))
        change = alpha / a.shape[1] * np.einsum("eor,eri->eoi", left, right)
        before = rows_of(open_model(bases["fused"]), name)
        np.testing.assert_allclose(before + change.reshape(values.shape), values, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        ("swapped", {"peft_version": None}, r"down_proj: experts' matrices \[256, 256\] are square"),
        ("fused", {"target_parameters": ["mlp.experts.down_proj"]}, r"2 pairs of matrices, target_parameters names 1"),
        ("fused", {"target_parameters": None}, r"mlp\.experts: 2 pairs of matrices, target_parameters names 0"),
        ("fused", {"r": 2}, r"gate_up_proj: \[9, 512, 256\], in the checkpoint \[6, 512, 256\]"),
        ("fused", {"r": 4}, r"says rank 4"),
    ],
)
def test_what_cannot_be_told_is_refused(
    layout: str, config: dict[str, Any], message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_expert_adapter(tmp_path / "lora", FACTORS, layout, **config)
    with pytest.raises(SourceError, match=message):
        open_model(bases["fused"], adapter=folder)


def test_experts_of_another_model_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    other = expert_factors({**CONFIG, "num_experts": 5}, rank=3)
    folder = write_expert_adapter(tmp_path / "lora", other, "fused")
    with pytest.raises(SourceError, match=r"gate_up_proj: \[5, 512, 256\], in the checkpoint \[6, 512, 256\]"):
        open_model(bases["fused"], adapter=folder)
    with pytest.raises(SourceError, match=r"gate_up_proj: \[5, 512, 256\], in the base model \[6, 512, 256\]"):
        plan_adapter(open_adapter(folder), open_model(bases["fused"]))
    with pytest.raises(SourceError, match=r"and the checkpoint has more experts"):
        open_model(bases["one by one"], adapter=folder)
