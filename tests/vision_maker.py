"""Makes small vision-language checkpoints in the exact Hugging Face layout, and pictures to show them.

Random numbers with a fixed seed, so large that every patch, head and channel gives numbers of its own: a wrong
permutation or a frame taken twice cannot pass a test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_maker import (
    source_shapes,
    text_config,
    tokenizer_json,
    weights_for,
    write_json_files,
    write_safetensors,
)

from pocketquant.architectures.qwen35_vision import QWEN35_VISION
from pocketquant.architectures.table import MODEL, shape_of

MEAN, STD = [0.5, 0.45, 0.4], [0.5, 0.25, 0.3]
"""One of each per colour, so that a swapped colour shows."""
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VISION_START, VISION_END, IMAGE, VIDEO = range(262, 266)
TEXT_PREFIXES = {
    "model.visual.": "model.language_model.",
    "visual.": "model.",
    "model.language_model.visual.": "model.language_model.",
}
"""The tower's prefix -> the text model's beside it."""
PICTURES = ((64, 128), (160, 96), (128, 128))
"""Height and width: one as small as llama.cpp allows, one upright, one with more patches than learned positions."""
BEFORE, AFTER = "Look: ", " What?"
"""The prompt around a picture; each letter is a token of its own."""
TOWER_4B = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560}
"""Qwen3.5-2B has the same, but for the last; 0.8B has 12 x 768, 9B and larger have 27 x 1152 with 4304."""
TOWER_9B = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096}


def vision_config(**changes: Any) -> dict[str, Any]:
    """A tower of 2 blocks and 64 columns, on a learned grid of 6 x 6 positions; keyword arguments replace keys."""
    config = {
        "model_type": "qwen3_5_vision",
        "depth": 2,
        "hidden_size": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 96,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 256,
        "num_position_embeddings": 36,
    }
    return {**config, **changes}


def both_config(vision: Mapping[str, Any] | None = None, **text_changes: Any) -> dict[str, Any]:
    """config.json of a vision-language model."""
    text = text_config(**text_changes)
    text.pop("architectures")
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "vision_config": dict(vision or vision_config()),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def vision_shapes(config: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every tensor of a tower."""
    sizes = QWEN35_VISION.read_sizes(config)
    shapes = {}
    for rule in QWEN35_VISION.tensors:
        blocks = [""] if rule.where == MODEL else [f"blocks.{i}." for i in range(sizes["n_layer"])]
        shapes |= {f"{prefix}{block}{rule.source}": shape_of(rule, sizes) for block in blocks}
    return shapes


def vision_weights(config: Mapping[str, Any], prefix: str = "model.visual.", seed: int = 1) -> dict[str, np.ndarray]:
    """Checkpoint name -> f32 array for every tensor of a tower."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in vision_shapes(config, prefix).items():
        values = rng.standard_normal(shape).astype(np.float32)
        if "pos_embed" in name:
            values *= np.float32(0.5)
        elif len(shape) > 1:
            values *= np.float32(1.5 * np.prod(shape[1:]) ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            values = 1 + np.float32(0.2) * values
        else:
            values *= np.float32(0.2)
        weights[name] = values
    return weights


def write_vision_files(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json and the small files beside it, with the special tokens of pictures."""
    write_json_files(folder, config, tokenizer_json(added=SPECIAL))
    scaling = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "image_mean": MEAN,
        "image_std": STD,
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 8192, "longest_edge": 16777216},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(scaling))


def make_vision_checkpoint(
    folder: Path,
    *,
    prefix: str = "model.visual.",
    dtype: str = "F32",
    vision: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A whole vision-language checkpoint; `weights` replace those of the tower."""
    folder.mkdir(parents=True, exist_ok=True)
    config = both_config(vision)
    text = weights_for(
        {**config["text_config"], "architectures": ["Qwen3_5ForCausalLM"]}, TEXT_PREFIXES.get(prefix, "model.")
    )
    tower = vision_weights(config["vision_config"], prefix) if weights is None else weights
    write_safetensors(folder / "model.safetensors", {**text, **tower}, dtype)
    write_vision_files(folder, config)
    return folder


def make_sparse_vision_checkpoint(folder: Path, vision: Mapping[str, Any], **text_changes: Any) -> Path:
    """A vision-language checkpoint of any size whose weights are a hole in the file: all zero, no disk used."""
    folder.mkdir(parents=True, exist_ok=True)
    config = both_config(vision_config(**{"num_position_embeddings": 2304, **vision}), **text_changes)
    text = {**config["text_config"], "architectures": ["Qwen3_5ForCausalLM"]}
    shapes = {name: shape for name, (_, shape) in source_shapes(text, "model.language_model.").items()}
    shapes |= vision_shapes(config["vision_config"], "model.visual.")
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    write_vision_files(folder, config)
    return folder


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """u8[height, width, 3]: slopes and noise, another in each colour. Sides are multiples of 32: nothing is resized."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    slopes = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], axis=-1)
    return (0.6 * slopes + 0.4 * rng.integers(0, 256, (height, width, 3))).astype(np.uint8)


def weights_digest(checkpoint: Path) -> str:
    """Says whether goldens belong to this checkpoint."""
    return sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
