"""What transformers' layers are made of: conversion undone, and the config read back from a GGUF's keys. No torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, moe_config, text_config, weights_for

from pocketquant import open_model
from pocketquant.architectures import architecture_named
from pocketquant.calibration.torch_layers import Setting, read_whole, source_weights, tensors_of

CONFIGS = {"dense": text_config(), "experts": moe_config()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_of_a_block_is_put_back_as_the_checkpoint_has_it(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    weights, extra = weights_for(config), {"num_experts": config["num_experts"]} if kind == "experts" else {}
    model = open_model(make_checkpoint(tmp_path / "m", dtype="F32", weights=weights, **extra))
    setting = Setting(None, str, None, model, "cpu", architecture_named(model.architecture).tensors)
    seen = 0
    for layer in range(model.sizes["n_layer"]):
        for rule, tensor in tensors_of(setting, layer):
            original = weights[f"model.layers.{layer}.{rule.source}"]
            original = original if rule.half is None else np.split(original, 2, axis=1)[rule.half]
            back = source_weights(rule, tensor, setting, read_whole(tensor))
            np.testing.assert_allclose(
                back.reshape(original.shape), original, rtol=1e-6, atol=2e-7, err_msg=tensor.name
            )
            seen += 1
    assert seen == sum(tensor.layer is not None for tensor in model.tensors)
    norm = next(tensor for tensor in model.tensors if tensor.name == "output_norm.weight")
    rule = next(rule for rule in setting.rules if rule.target == norm.name)
    back = source_weights(rule, norm, setting, read_whole(norm))
    np.testing.assert_allclose(back, weights["model.norm.weight"], atol=2e-7)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_config_for_transformers_says_what_the_checkpoints_did(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    extra = {"num_experts": config["num_experts"]} if kind == "experts" else {}
    model = open_model(make_checkpoint(tmp_path / "m", **extra))
    architecture = architecture_named(model.architecture)
    assert architecture.transformers is not None
    keys = {key.removeprefix(f"{model.architecture}."): value.value for key, value in model.metadata.items()}
    kinds = architecture.kinds_from_gguf(model.metadata, model.sizes["n_layer"])
    found = architecture.transformers.config(keys, model.sizes, kinds)
    found |= {key: model.sizes[word] for word, key in architecture.config_keys.items()}
    assert found.pop("rope_parameters") == config["rope_parameters"]
    assert found == {key: config[key] for key in found}
