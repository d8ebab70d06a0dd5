"""Predicted losses of one model, every tensor in every format, as a table: in memory and as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from pocketquant.calibration.statistics import fingerprint
from pocketquant.errors import RecipeError, listing
from pocketquant.files.replacing import replacing
from pocketquant.files.small import parse_json, read_text
from pocketquant.formats import FORMATS
from pocketquant.model import Model, Role, Tensor
from pocketquant.quant.sensitivity import EXACT, Sensitivity, read_sensitivity

SCHEMA = "pocketquant.losses/1"
MAX_TABLE_BYTES = 1 << 26
_KEYS = {"schema", "source", "model_sha256", "multipliers", "losses"}


@dataclass(frozen=True)
class LossTable:
    """Predicted losses of one model.

    Attributes:
        source: what they were predicted from, in words.
        model_sha256: `fingerprint` of the model.
        losses: tensor name -> format name -> nats a token.
        multipliers: role -> what its figures are to be multiplied by, from real runs (`recalibrate`).
    """

    source: str
    model_sha256: str
    losses: Mapping[str, Mapping[str, float]]
    multipliers: Mapping[Role, float] = field(default_factory=dict)

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that some tensor has a figure for, and the exact ones."""
        known = {name for row in self.losses.values() for name in row} | set(EXACT)
        return tuple(name for name in FORMATS if name in known)

    def predict(self, model: Model) -> LossTable:
        """Itself, once it is known to be of this model.

        Raises:
            RecipeError: it was made from another one.
        """
        if fingerprint(model) != self.model_sha256:
            raise RecipeError(f"{self.source}: predicted losses of another model than this one; make them anew")
        return self

    def loss(self, tensor: Tensor, format_name: str) -> float:
        """Predicted loss of one tensor in a format; RecipeError if the table has no figure for it."""
        if tensor.keep_f32 or format_name in EXACT:
            return 0.0
        row = self.losses.get(tensor.name, {})
        if format_name not in row:
            raise RecipeError(f"{tensor.name}: {self.source} has no figure for {format_name}; it has {' '.join(row)}")
        return row[format_name] * self.multipliers.get(tensor.role, 1.0)

    def has(self, tensor: Tensor, format_name: str) -> bool:
        """Whether there is a figure."""
        return format_name in EXACT or format_name in self.losses.get(tensor.name, {})


def write_losses(table: LossTable, path: Path | str) -> None:
    """Writes a table as JSON.

    Raises:
        OutputError: the file cannot be written.
    """
    document = {
        "schema": SCHEMA,
        "source": table.source,
        "model_sha256": table.model_sha256,
        "multipliers": {role.value: value for role, value in table.multipliers.items()},
        "losses": table.losses,
    }
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def parse_losses(text: str, where: str) -> LossTable:
    """Parses a table strictly.

    Raises:
        RecipeError: not such a table, or figures that make no sense (all listed).
    """
    table = parse_json(text, where, RecipeError)
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        raise RecipeError(f"{where}: no table of predicted losses; `pocketquant sensitivity` makes one")
    faults = [f"unknown key {key!r}" for key in table if key not in _KEYS]
    faults += [f"{key}: missing" for key in ("source", "model_sha256") if not isinstance(table.get(key), str)]
    losses, multipliers = table.get("losses"), table.get("multipliers", {})
    if not isinstance(losses, dict) or not losses:
        faults.append("losses: no figures")
        losses = {}
    for name, row in losses.items():
        if not isinstance(row, dict):
            faults.append(f"{name}: expected format -> figure")
            continue
        faults += [f"{name}: unknown format {kind!r}" for kind in row if kind not in FORMATS]
        faults += [f"{name}.{kind}: expected a number not below 0" for kind, v in row.items() if not _is_figure(v)]
    roles = {role.value for role in Role}
    if not isinstance(multipliers, dict) or any(k not in roles or not _is_figure(v) for k, v in multipliers.items()):
        faults.append("multipliers: expected role -> number not below 0")
        multipliers = {}
    if faults:
        raise RecipeError(f"{where}: {len(faults)} fault(s) in the table of losses\n{listing(faults)}")
    return LossTable(
        str(table["source"]),
        str(table["model_sha256"]),
        losses,
        {Role(name): float(value) for name, value in multipliers.items()},
    )


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value >= 0


def read_figures(path: Path | str | None) -> Sensitivity | LossTable:
    """A table for `--sensitivity`: predicted losses of one model (JSON), or sensitivities by role and layer (TOML).

    Raises:
        RecipeError: as `parse_losses` and `read_sensitivity`.
    """
    if path is None:
        return read_sensitivity()
    text = read_text(path, MAX_TABLE_BYTES, RecipeError)
    return parse_losses(text, str(path)) if text.lstrip().startswith("{") else read_sensitivity(path)
