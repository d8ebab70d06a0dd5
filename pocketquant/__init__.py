"""Qwen3.5 checkpoints -> GGUF files for phones and laptops, and what the quantization cost.

    model = pocketquant.open_model("Qwen3.5-4B")               # checkpoint folder or GGUF
    plan = pocketquant.plan(model, pocketquant.open_recipe("q4_k_m"))
    pocketquant.write(plan, "Qwen3.5-4B-Q4_K_M.gguf")
    report = pocketquant.compare("Qwen3.5-4B-Q4_K_M.gguf", "Qwen3.5-4B-BF16.gguf", "text.txt")

Importing this package imports nothing heavy; each name is loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketquant.convert import open_model
    from pocketquant.errors import PocketquantError
    from pocketquant.eval import compare, weight_errors
    from pocketquant.gguf_file.writing import write
    from pocketquant.model import Model, Plan, Role, Tensor
    from pocketquant.quant import open_recipe, plan, read_importance
    from pocketquant.release.make import make_release

__version__ = "0.1.0"

_HOMES = {
    "Model": "model",
    "Plan": "model",
    "PocketquantError": "errors",
    "Role": "model",
    "Tensor": "model",
    "compare": "eval",
    "make_release": "release.make",
    "open_model": "convert",
    "open_recipe": "quant",
    "plan": "quant",
    "read_importance": "calibration.importance",
    "weight_errors": "eval",
    "write": "gguf_file.writing",
}

__all__ = [
    "Model",
    "Plan",
    "PocketquantError",
    "Role",
    "Tensor",
    "compare",
    "make_release",
    "open_model",
    "open_recipe",
    "plan",
    "read_importance",
    "weight_errors",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pocketquant' has no attribute {name!r}")
    return getattr(import_module(f"pocketquant.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
