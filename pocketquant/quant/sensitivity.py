"""What rounding each tensor is expected to cost, from a table of measured figures.

    predicted loss = sum over the tensors of  n_weights * sensitivity(role, layer) * error(format)

`error` is a format's loss relative to Q4_K's when every matrix has that format, so it is 1 for Q4_K; `sensitivity` is
scaled so that the whole model in Q4_K is predicted to lose what the measured models of its size lost. The loss is KL
divergence in nats a token, of the weights alone. For models unlike the measured ones it is good for comparing plans and
for nothing else.

How the figures of `sensitivity.toml` (its head names the source) reach another model:

* **A figure belongs to a tensor, not to a weight.** A format's error relative to a tensor's values is the same at any
  width, so the tensor's share of the loss is kept and divided by its own number of weights.
* **Layers by relative depth.** The first and the last block keep figures of their own; between them the figures are
  interpolated, and scaled so that a role's sum over the blocks does not depend on their number.
* **Models by size.** Between two measured models everything is interpolated in the logarithms of the figure and of the
  number of weights; a model smaller or larger than all of them takes the nearest one's.
* **Roles that nobody measured** stand for one that was: see `STANDS_FOR`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from math import exp, isfinite, log
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.errors import RecipeError, listing
from pocketquant.files.small import parse_toml, read_text
from pocketquant.formats import FORMATS
from pocketquant.model import Model, Role, Tensor

MAX_TABLE_BYTES = 1 << 20
"""A table larger than this is refused unread."""

STANDS_FOR: dict[Role, tuple[Role, float]] = {
    Role.HEAD: (Role.EMBED, 1.0),  # the published figure is of a tied embedding, where the head does the harm
    Role.EXPERT_GATE: (Role.FFN_GATE, 1.0),  # all experts of a block together are its feed-forward
    Role.EXPERT_UP: (Role.FFN_UP, 1.0),
    Role.EXPERT_DOWN: (Role.FFN_DOWN, 1.0),
    Role.SHARED_GATE: (Role.FFN_GATE, 1.0),  # every token passes it, and it is a large part of the block's output
    Role.SHARED_UP: (Role.FFN_UP, 1.0),
    Role.SHARED_DOWN: (Role.FFN_DOWN, 1.0),
    Role.ROUTER: (Role.DELTA_BETA, 1.0),  # few weights that steer all others
    Role.SHARED_ROUTER: (Role.DELTA_BETA, 1.0),
    Role.MTP_JOIN: (Role.ATTN_OUT, 1.0),
    Role.VISION_PATCH: (Role.ATTN_V, 1.0),
    Role.VISION_QKV: (Role.ATTN_V, 1.0),
    Role.VISION_OUT: (Role.ATTN_OUT, 1.0),
    Role.VISION_UP: (Role.FFN_UP, 1.0),
    Role.VISION_DOWN: (Role.FFN_DOWN, 1.0),
    Role.VISION_MERGE: (Role.EMBED, 0.25),  # makes the embeddings of all image tokens, and is no head
}
"""Role -> the measured role whose figure it takes, and by what to multiply it. Assumptions, all of them."""

UNTIED_EMBED = 0.25
"""An embedding that is not the head as well, relative to one that is. An assumption."""

_SCHEMA = 1
EXACT = tuple(item.name for item in FORMATS.values() if item.is_plain)
"""Formats that lose nothing that counts."""
_MEASURED_KEYS = {"model", "n_weights", "n_layer", "probe", "floor", "whole_model", "roles"}


@dataclass(frozen=True)
class Curve:
    """One role's figures over relative depth, 0 the first block and 1 the last; one figure at 0 outside the blocks."""

    depths: tuple[float, ...]
    loss: tuple[float, ...]
    n_layer: int
    in_blocks: bool

    def at(self, layer: int | None, n_layer: int) -> float:
        """The figure of a tensor of block `layer` of `n_layer`."""
        if layer is None or not self.in_blocks:
            return self.loss[0]
        depth = layer / max(1, n_layer - 1)
        if depth in (0.0, 1.0) and depth in self.depths:
            return self.loss[self.depths.index(depth)]
        inner = [(d, log(v)) for d, v in zip(self.depths, self.loss, strict=True) if 0 < d < 1]
        inner = inner or [(d, log(v)) for d, v in zip(self.depths, self.loss, strict=True)]
        per_block = max(1, self.n_layer - 2) / max(1, n_layer - 2)
        return per_block * exp(float(np.interp(depth, [d for d, _ in inner], [v for _, v in inner])))


@dataclass(frozen=True)
class Measured:
    """The figures of one model.

    Attributes:
        n_weights: of the model.
        whole_model: format -> loss of the whole model in it, without the part that no weight causes.
        curves: role -> loss of one tensor in the probe format.
    """

    model: str
    n_weights: int
    whole_model: Mapping[str, float]
    curves: Mapping[Role, Curve]


@dataclass(frozen=True)
class Sensitivity:
    """A table: where its figures come from, and those of each measured model by ascending size."""

    source: str
    measured: tuple[Measured, ...]

    def predict(self, model: Model) -> LossByRole:
        """What each tensor of a model is expected to lose, for every format with a figure.

        Raises:
            RecipeError: roles that the table has no figures for.
        """
        weights = [tensor for tensor in model.tensors if not tensor.keep_f32]
        missing = sorted({tensor.role.value for tensor in weights if self._measured_role(tensor) is None})
        if missing:
            raise RecipeError(f"{self.source}: no sensitivity for roles of this model\n{listing(missing)}")
        n_weights = model.n_weights
        figures = {tensor.name: self._figure(tensor, model, n_weights) for tensor in weights}
        names = set.intersection(*(set(item.whole_model) for item in self.measured))
        whole = {name: self._between([item.whole_model[name] for item in self.measured], n_weights) for name in names}
        scale = whole["Q4_K"] / (sum(figures.values()) or 1.0)
        error = {name: figure / whole["Q4_K"] for name, figure in whole.items()} | dict.fromkeys(EXACT, 0.0)
        return LossByRole(
            {name: figure * scale for name, figure in figures.items()},
            {name: error[name] for name in FORMATS if name in error},
        )

    def _measured_role(self, tensor: Tensor) -> Role | None:
        role = tensor.role
        while all(role not in item.curves for item in self.measured):
            if role not in STANDS_FOR:
                return None
            role = STANDS_FOR[role][0]
        return role if all(role in item.curves for item in self.measured) else None

    def _figure(self, tensor: Tensor, model: Model, n_weights: int) -> float:
        role = self._measured_role(tensor)
        assert role is not None
        n_layer, layer = model.sizes["n_layer"], tensor.layer
        if layer is not None and layer >= n_layer:  # multi-token prediction: like a late block, not like the last one
            layer = max(0, n_layer - 2)
        figure = self._between([item.curves[role].at(layer, n_layer) for item in self.measured], n_weights)
        if role is not tensor.role:
            figure *= STANDS_FOR[tensor.role][1]
        elif role is Role.EMBED and not model.is_tied:
            figure *= UNTIED_EMBED
        return figure

    def _between(self, figures: Sequence[float], n_weights: int) -> float:
        """The figure at a number of weights: both in logarithms."""
        sizes = [log(item.n_weights) for item in self.measured]
        return exp(float(np.interp(log(n_weights), sizes, [log(figure) for figure in figures])))


@dataclass(frozen=True)
class LossByRole:
    """What each tensor of one model is expected to lose.

    Attributes:
        at_q4_k: tensor name -> loss in Q4_K (n_weights * sensitivity); tensors kept in F32 are not in it.
        error: format name -> its loss relative to Q4_K's.
    """

    at_q4_k: Mapping[str, float]
    error: Mapping[str, float]

    def has(self, tensor: Tensor, format_name: str) -> bool:
        """Whether there is a figure."""
        return format_name in self.error

    def loss(self, tensor: Tensor, format_name: str) -> float:
        """Expected loss of one tensor in a format, in nats a token; RecipeError if the table says nothing of it."""
        if format_name not in self.error:
            raise RecipeError(
                f"{tensor.name}: the table of sensitivities has no figure for {format_name}; "
                f"it has {' '.join(self.error)}"
            )
        return self.at_q4_k.get(tensor.name, 0.0) * self.error[format_name]


def read_sensitivity(path: Path | str | None = None) -> Sensitivity:
    """Reads a table of sensitivities; the one that comes with the package if no file is named.

    Raises:
        RecipeError: no such file, too large, not TOML, or figures that make no sense (all listed).
    """
    if path is None:
        packaged = resources.files("pocketquant.quant") / "sensitivity.toml"
        return parse_sensitivity(packaged.read_text(encoding="utf-8"), "sensitivity.toml")
    return parse_sensitivity(read_text(path, MAX_TABLE_BYTES, RecipeError), str(path))


def parse_sensitivity(text: str, where: str) -> Sensitivity:
    """Parses a table strictly: whatever is not understood is refused, all of it in one message.

    Raises:
        RecipeError: not TOML, unknown keys or roles, or figures that are no positive numbers.
    """
    table = parse_toml(text, where, RecipeError)
    faults = [f"unknown key {key!r}" for key in table if key not in {"schema", "source", "measured"}]
    if table.get("schema") != _SCHEMA:
        faults.append(f"schema: expected {_SCHEMA}, got {table.get('schema')!r}")
    source, entries = table.get("source"), table.get("measured")
    if not isinstance(source, str) or not source:
        faults.append("source: say where the figures come from")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        faults.append("measured: write each model as [[measured]]")
        entries = []
    measured = [_measured(entry, f"model {number}: ", faults) for number, entry in enumerate(entries, start=1)]
    measured.sort(key=lambda item: item.n_weights)
    if len({item.n_weights for item in measured}) < len(measured):
        faults.append("n_weights: two models of one size; there is no telling which to use")
    if faults:
        raise RecipeError(f"{where}: {len(faults)} fault(s) in the table of sensitivities\n{listing(faults)}")
    return Sensitivity(str(source), tuple(measured))


def _measured(entry: Mapping[str, Any], where: str, faults: list[str]) -> Measured:
    faults.extend(f"{where}unknown key {key!r}" for key in entry if key not in _MEASURED_KEYS)
    n_weights, n_layer = (_count(entry.get(key), f"{where}{key}", faults) for key in ("n_weights", "n_layer"))
    floor = entry.get("floor", 0.0)
    if not _is_number(floor) or floor < 0:
        faults.append(f"{where}floor: expected a number not below 0, got {floor!r}")
        floor = 0.0
    whole = entry.get("whole_model")
    whole = whole if isinstance(whole, dict) else {}
    if "Q4_K" not in whole:
        faults.append(f"{where}whole_model: no figure for Q4_K, which all others are relative to")
    for name, figure in whole.items():
        if name not in FORMATS or name in EXACT:
            faults.append(f"{where}whole_model: unknown format {name!r}")
        elif not _is_number(figure) or figure <= floor:
            faults.append(f"{where}whole_model.{name}: expected a number above the floor of {floor}, got {figure!r}")
    known = {role.value for role in Role}
    roles = entry.get("roles")
    curves = {}
    for name, figures in roles.items() if isinstance(roles, dict) else ():
        if name in known and isinstance(figures, dict):
            curves[Role(name)] = _curve(figures, n_layer, f"{where}{name}: ", faults)
        else:
            faults.append(f"{where}unknown role {name!r}")
    if not curves:
        faults.append(f"{where}roles: no figures")
    usable = {name: figure - floor for name, figure in whole.items() if _is_number(figure) and figure > floor}
    return Measured(str(entry.get("model", "")), n_weights, usable, curves)


def _curve(figures: Mapping[str, Any], n_layer: int, where: str, faults: list[str]) -> Curve:
    faults.extend(f"{where}unknown key {key!r}" for key in figures if key not in {"layers", "loss"})
    loss, layers = figures.get("loss"), figures.get("layers")
    if not isinstance(loss, list) or not loss or not all(_is_number(figure) and figure > 0 for figure in loss):
        faults.append(f"{where}loss: expected a list of numbers above 0")
        loss = [1.0]
    expected = 1 if layers is None else len(layers) if isinstance(layers, list) else 0
    if len(loss) != expected:
        faults.append(f"{where}{len(loss)} figures for {expected} layers")
    if layers is None or not isinstance(layers, list):
        return Curve((0.0,), (float(loss[0]),), n_layer, in_blocks=False)
    in_range = all(type(layer) is int and 0 <= layer < n_layer for layer in layers)
    if not in_range or any(a >= b for a, b in pairwise(layers)):
        faults.append(f"{where}layers: expected rising numbers from 0 to {n_layer - 1}")
        return Curve((0.0,), (1.0,), n_layer, in_blocks=False)
    depths = tuple(layer / max(1, n_layer - 1) for layer in layers)
    return Curve(depths, tuple(float(figure) for figure in loss), n_layer, in_blocks=True)


def _count(value: Any, where: str, faults: list[str]) -> int:
    if type(value) is int and 0 < value < 1 << 48:
        return value
    faults.append(f"{where}: expected a whole number above 0, got {value!r}")
    return 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
