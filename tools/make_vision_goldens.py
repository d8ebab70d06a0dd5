"""Writes tests/golden/vision.npz: what transformers computes from a small random vision-language model and pictures.

    python tools/make_vision_goldens.py         # needs tools/requirements.txt and Pillow

The checkpoint is not kept: `tests/vision_maker.py` makes it again from a fixed seed, and `sha256` says whether it is
the same. For each picture of `tests/vision_maker.py`'s PICTURES, in f32 on a CPU:
    embeddings_<i>  f32[n_tokens, 256]  what the vision tower hands to the text model
    logits_<i>      f32[320]            after the last token of the prompt with that picture in it
    sha256          str                 of all weights of the checkpoint
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3_5ForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from vision_maker import (  # noqa: E402
    AFTER,
    BEFORE,
    IMAGE,
    MEAN,
    PICTURES,
    STD,
    VISION_END,
    VISION_START,
    make_vision_checkpoint,
    picture,
    weights_digest,
)


def prepare(pixels: np.ndarray) -> Any:
    """Patches and grid as transformers' own image processor makes them."""
    processor = Qwen2VLImageProcessorPil(
        image_mean=MEAN, image_std=STD, patch_size=16, size={"shortest_edge": 8192, "longest_edge": 1 << 24}
    )
    return processor(images=[Image.fromarray(pixels)], return_tensors="pt")


def main() -> None:
    """Makes the checkpoint, runs it, writes the goldens."""
    goldens: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_vision_checkpoint(Path(folder) / "Tiny-1M")
        goldens["sha256"] = weights_digest(checkpoint)
        model, loading = Qwen3_5ForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, output_loading_info=True
        )
        assert not any(loading.values()), loading
        model.eval()
    for i, shape in enumerate(PICTURES):
        images = prepare(picture(*shape, seed=i))
        with torch.no_grad():
            output = model.model.visual(images["pixel_values"], grid_thw=images["image_grid_thw"])
            embeddings = output.pooler_output
            n_tokens = len(embeddings)
            ids = [*BEFORE.encode(), VISION_START, *[IMAGE] * n_tokens, VISION_END, *AFTER.encode()]
            tokens = torch.tensor([ids])
            logits = model(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                mm_token_type_ids=(tokens == IMAGE).int(),
                **images,
            ).logits[0, -1]
        goldens[f"embeddings_{i}"] = embeddings.numpy()
        goldens[f"logits_{i}"] = logits.numpy()
        print(shape, tuple(images["image_grid_thw"][0].tolist()), n_tokens, float(logits.std()))
    np.savez_compressed(ROOT / "tests/golden/vision.npz", **goldens)


if __name__ == "__main__":
    main()
