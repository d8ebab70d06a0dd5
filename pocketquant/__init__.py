"""Qwen3.5 checkpoints -> GGUF files for phones and laptops, and what the quantization cost.

    made = pocketquant.make("Qwen3.5-4B", "out")                # 4-bit and 8-bit files, measured, with a report
    pocketquant.quantize("Qwen3.5-4B", "4b.gguf", "q4_k_m")     # one file

and step by step:

    model = pocketquant.open_model("Qwen3.5-4B")                # checkpoint folder or GGUF
    choice = pocketquant.Choice(target=pocketquant.Target(file_bytes=2_600_000_000))
    plan = pocketquant.plan(model, choice)                      # every tensor's type, and why; nothing is written
    pocketquant.write(plan, "4b.gguf")
    report = pocketquant.evaluate("4b.gguf", "Qwen3.5-4B-BF16.gguf", "text.txt")

Importing this package imports nothing heavy; each name is loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketquant.api import (
        Bars,
        CollectSettings,
        EvalSettings,
        Made,
        MadeFile,
        Means,
        Opening,
        Output,
        ReleaseSettings,
        calibrate,
        check_file,
        convert_source,
        evaluate,
        gate,
        imatrix,
        make,
        quantize,
        report,
    )
    from pocketquant.calibration.importance import Importance, read_importance
    from pocketquant.calibration.statistics import Statistics, open_statistics
    from pocketquant.convert import open_model
    from pocketquant.errors import PocketquantError
    from pocketquant.eval import compare, weight_errors
    from pocketquant.gguf_file.writing import write
    from pocketquant.model import Allocation, Model, Plan, Role, Tensor
    from pocketquant.quant import Choice, Target, open_recipe, plan, with_figures
    from pocketquant.quant.explain import explain
    from pocketquant.quant.loss_table import read_figures
    from pocketquant.release.make import make_release
    from pocketquant.release.planning import plan_release

__version__ = "0.1.0"

_HOMES = {
    "Allocation": "model",
    "Bars": "api",
    "Choice": "quant",
    "CollectSettings": "api",
    "EvalSettings": "api",
    "Importance": "calibration.importance",
    "Made": "api",
    "MadeFile": "api",
    "Means": "api",
    "Model": "model",
    "Opening": "api",
    "Output": "api",
    "Plan": "model",
    "PocketquantError": "errors",
    "ReleaseSettings": "api",
    "Role": "model",
    "Statistics": "calibration.statistics",
    "Target": "quant",
    "Tensor": "model",
    "calibrate": "api",
    "check_file": "api",
    "compare": "eval",
    "convert_source": "api",
    "evaluate": "api",
    "explain": "quant.explain",
    "gate": "api",
    "imatrix": "api",
    "make": "api",
    "make_release": "release.make",
    "open_model": "convert",
    "open_recipe": "quant",
    "open_statistics": "calibration.statistics",
    "plan": "quant",
    "plan_release": "release.planning",
    "quantize": "api",
    "read_figures": "quant.loss_table",
    "read_importance": "calibration.importance",
    "report": "api",
    "weight_errors": "eval",
    "with_figures": "quant",
    "write": "gguf_file.writing",
}

__all__ = [
    "Allocation",
    "Bars",
    "Choice",
    "CollectSettings",
    "EvalSettings",
    "Importance",
    "Made",
    "MadeFile",
    "Means",
    "Model",
    "Opening",
    "Output",
    "Plan",
    "PocketquantError",
    "ReleaseSettings",
    "Role",
    "Statistics",
    "Target",
    "Tensor",
    "calibrate",
    "check_file",
    "compare",
    "convert_source",
    "evaluate",
    "explain",
    "gate",
    "imatrix",
    "make",
    "make_release",
    "open_model",
    "open_recipe",
    "open_statistics",
    "plan",
    "plan_release",
    "quantize",
    "read_figures",
    "read_importance",
    "report",
    "weight_errors",
    "with_figures",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pocketquant' has no attribute {name!r}")
    return getattr(import_module(f"pocketquant.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
