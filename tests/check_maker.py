"""A good file to spoil, and how to look at what a check says about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from checkpoint_maker import make_checkpoint, text_config, weights_for
from gguf_maker import Parts

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.check import ERROR, CheckReport
from pocketquant.model import Value


def make_trained_checkpoint(folder: Path) -> Path:
    """A checkpoint whose DeltaNet norms are around 1, as trained ones are."""
    weights = weights_for(text_config())
    for name in weights:
        if name.endswith("linear_attn.norm.weight"):
            weights[name] += 1
    return make_checkpoint(folder, weights=weights)


def make_good_gguf(checkpoint: Path, target: Path) -> Path:
    """The checkpoint in BF16, as it should be."""
    write(plan(open_model(checkpoint), open_recipe("bf16")), target)
    return target


def found(report: CheckReport, severity: str = ERROR) -> set[tuple[str, str]]:
    return {(finding.code, finding.tensor) for finding in report.findings if finding.severity == severity}


def message(report: CheckReport, code: str) -> str:
    return next(f"{finding.message} -> {finding.advice}" for finding in report.findings if finding.code == code)


def set_key(key: str, kind: str, value: object) -> Callable[[Parts], None]:
    return lambda parts: parts.metadata.update({key: Value(kind, value)})


def scale(name: str, factor: float) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        values, kind = parts.tensors[name]
        parts.tensors[name] = (values * np.float32(factor), kind)

    return change
