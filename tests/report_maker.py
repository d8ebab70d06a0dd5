"""Reports as `eval --json` and `make` write them, small and made up: every number differs from every other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

ROLES = ("embed", "attn_q", "delta_qkv", "ffn_down", "norm")


def make_evaluation(
    name: str, *, kld: float, size: int = 2_400_000, texts: int = 2, n_layer: int = 4
) -> dict[str, Any]:
    """One measurement; domains, positions, confidence, tensors and a noise floor included."""

    def metrics(factor: float) -> dict[str, Any]:
        mean = kld * factor
        return {
            "kld": {"mean": mean, "se": mean / 20, "p99": 7 * mean, "p99_se": mean / 3},
            "top1": {"mean": 1 - mean, "se": mean / 10},
            "ppl": {"ratio": 1 + mean / 9, "ratio_se": mean / 50},
        }

    def bucket(low: float, high: float, factor: float) -> dict[str, Any]:
        mean = kld * factor
        return {"low": low, "high": high, "tokens": 640, "kld": mean, "kld_se": mean / 15, "top1": 0.9, "top1_se": 0.01}

    domains = [
        {
            "domain": f"domain {i}",
            "file": {"name": f"text-{i}.txt", "size": 1000 + i, "sha256": f"{i:064x}"},
            "tokens": 500 + i,
            "metrics": metrics(1 + 0.4 * i),
        }
        for i in range(texts)
    ]
    edges = (0, 16, 32, 64, 128)
    tensors = [
        {
            "name": f"{'token_embd' if layer is None else f'blk.{layer}.{role}'}.weight",
            "role": role,
            "layer": layer,
            "format": "F32" if role == "norm" else "Q4_K",
            "weights": 1000,
            "relative_rmse": 0.0 if role == "norm" else kld * (2 + place + (layer or 0) / 10),
        }
        for place, role in enumerate(ROLES)
        for layer in ([None] if role == "embed" else range(n_layer))
    ]
    return {
        "schema": "pocketquant.report/1",
        "metrics": metrics(1.0),
        "tokens": 1001,
        "windows": 8,
        "non_finite": 0,
        "by_domain": domains,
        "by_position": [bucket(a, b, 1 + b / 1000) for a, b in pairwise(edges)],
        "by_confidence": [bucket(i / 4, (i + 1) / 4, 1.5 - i / 4) for i in range(4)],
        "noise_floor": {"metrics": {"kld": {"mean": kld / 500}}},
        "tensors": tensors,
        "provenance": {
            "model": {"name": f"{name}.gguf", "size": size, "sha256": f"{size:064x}"},
            "reference": {"name": "Tiny-F32.gguf", "size": 15_000_000, "sha256": "f" * 64},
            "corpus": {"name": "text", "size": 1, "sha256": "c" * 64},
            "context": 256,
            "chunks": 8,
            "seed": 0,
            "versions": {"pocketquant": "0.1.0", "numpy": "2.0"},
        },
    }


def make_tasks() -> dict[str, Any]:
    """What `tasks --json` writes, one measure of each kind."""
    answers = {"items": 400, "model": 0.6125, "reference": 0.635, "difference": -0.0225, "standard_error": 0.0121}
    answers |= {"lost": 17, "gained": 8, "p_value": 0.108, "smallest_effect": 0.034}
    return {
        "schema": "pocketquant.tasks/1",
        "model": {"name": "Tiny-Q4_K.gguf"},
        "reference": {"name": "Tiny-F32.gguf"},
        "results": [
            {"task": "cloze", "metric": "acc", "answers": answers, "mean_difference": None},
            {"task": "copy", "metric": "f1", "answers": None, "mean_difference": [-0.021, 0.013]},
        ],
    }
