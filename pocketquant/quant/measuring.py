"""Measures what rounding costs by running the model: one role and group of layers at a time, all else exact.

A copy of the full-precision file is changed in place, scored against the original, and put back, so every run costs one
evaluation and no file of its own is written. All weights are full-precision numbers that took a format's values: what
kernels do to activations is not in the figures.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.errors import EvalError, RecipeError
from pocketquant.files.reading import sha256_of
from pocketquant.files.replacing import replacing
from pocketquant.files.small import read_object
from pocketquant.formats import FORMATS, offered_formats
from pocketquant.gguf_file.opening import open_unfused
from pocketquant.gguf_file.reading import read_header
from pocketquant.gguf_file.writing import CHUNK_WEIGHTS, naming_overflow
from pocketquant.model import Model, Role, Tensor
from pocketquant.quant.loss_table import LossTable

PROBE = "Q3_K"
"""Large enough an error to stand out of the noise, small enough for errors to add up."""

WHOLE = tuple(item.name for item in offered_formats() if item.offered == "measured")
"""Formats that the whole model is measured in."""

LEAST, MOST = 0.25, 4.0
"""Bounds of a multiplier: beyond them the run, not the prediction, is in doubt."""

Judge = Callable[[Path, Path], float]
"""Mean KL divergence of the first file from the second, nats a token."""

Progress = Callable[[int, int], None]
"""Called with runs done and runs in all."""


@dataclass(frozen=True)
class Group:
    """Tensors that are rounded together: one role, and some of its layers."""

    role: Role
    layers: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        return f"{self.role.value} {','.join(map(str, self.layers))}".strip()


def list_groups(model: Model, n_groups: int | None = None) -> list[Group]:
    """Every role, its layers cut into at most so many groups; the first and the last layer stay on their own.

    Args:
        model: the model.
        n_groups: groups of layers of a role; None for one of each layer.
    """
    by_role: dict[Role, list[Tensor]] = {}
    for tensor in model.tensors:
        if not tensor.keep_f32 and (tensor.layer is None or tensor.layer < model.sizes["n_layer"]):
            by_role.setdefault(tensor.role, []).append(tensor)
    groups = []
    for role, tensors in by_role.items():
        layers = sorted({tensor.layer for tensor in tensors if tensor.layer is not None})
        for part in _parts(layers, n_groups) if layers else [()]:
            groups.append(Group(role, part, tuple(t for t in tensors if not layers or t.layer in part)))
    return groups


def _parts(layers: Sequence[int], n_groups: int | None) -> list[tuple[int, ...]]:
    if n_groups is None or n_groups >= len(layers):
        return [(layer,) for layer in layers]
    if n_groups == 1:
        return [tuple(layers)]
    if n_groups == 2:
        return [tuple(layers[:1]), tuple(layers[1:])]
    inner = np.array_split(np.array(layers[1:-1]), n_groups - 2)
    return [(layers[0],), *(tuple(int(n) for n in part) for part in inner if len(part)), (layers[-1],)]


@dataclass(frozen=True)
class Runs:
    """Runs of one model in full precision, each remembered in a file, so that an interrupted series goes on.

    Attributes:
        reference: GGUF in F32.
        work: a copy of it that is changed and put back.
        judge: scores.
        state: where results are kept.
        conditions: what the results depend on besides the model; results of others are not taken up.
    """

    reference: Path
    work: Path
    judge: Judge
    state: Path
    conditions: Mapping[str, Any]

    def measure(self, label: str, types: Mapping[str, str]) -> float:
        """KL divergence with the named tensors rounded to their formats, plainly, and all others exact."""
        found = self._results()
        key = f"{label}: {' '.join(sorted(set(types.values())))}"
        if key not in found:
            with _rounded(self.reference, self.work, types):
                found[key] = self.judge(self.work, self.reference)
            with replacing(self.state, is_result=False) as temporary:
                temporary.write_text(json.dumps({"run": self._run(), "results": found}, indent=1))
        return found[key]

    def _run(self) -> dict[str, Any]:
        return {"reference": sha256_of(self.reference), **self.conditions}

    def _results(self) -> dict[str, float]:
        if not self.state.exists():
            return {}
        try:
            kept = read_object(self.state, EvalError)
            if kept["run"] != json.loads(json.dumps(self._run())):
                raise EvalError(
                    f"{self.state}: holds results of another model or of other settings; delete it, or repeat "
                    "the command that began it"
                )
            return {str(key): float(value) for key, value in kept["results"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvalError(
                f"{self.state}: does not hold the results of an unfinished run ({error}); delete it"
            ) from error


@contextmanager
def _rounded(reference: Path, work: Path, types: Mapping[str, str]) -> Iterator[None]:
    """While the block runs, the work file's named tensors have the values of their formats.

    Where it does not end well the work file is gone: an interrupt does not wait until everything is put back.
    """
    tensors = {tensor.name: tensor for tensor in open_unfused(reference).tensors}
    places = {tensor.name: tensor.offset for tensor in read_header(reference).tensors}
    wrong = [name for name in types if tensors[name].dtype != "F32"]
    if wrong:
        raise RecipeError(f"{reference}: {wrong[0]} is {tensors[wrong[0]].dtype}; measuring needs a file in F32")
    try:
        if not work.exists():
            shutil.copyfile(reference, work)
        _write(work, tensors, places, types)
        yield
        _write(work, tensors, places, dict.fromkeys(types, ""))
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def _write(work: Path, tensors: Mapping[str, Tensor], places: Mapping[str, int], types: Mapping[str, str]) -> None:
    with work.open("r+b") as file:
        for name, kind in types.items():
            tensor = tensors[name]
            step = max(1, CHUNK_WEIGHTS // tensor.n_cols)
            for start in range(0, tensor.n_rows, step):
                rows = tensor.rows(start, min(start + step, tensor.n_rows))
                if kind:
                    with naming_overflow(tensor):
                        rows = FORMATS[kind].decode(FORMATS[kind].encode(np.ascontiguousarray(rows)), tensor.n_cols)
                file.seek(places[name] + 4 * start * tensor.n_cols)
                file.write(np.ascontiguousarray(rows, "<f4").tobytes())


def _types(tensors: Iterable[Tensor], name: str) -> dict[str, str]:
    """Tensor name -> the format, or what stands in for it where rows do not fit."""
    return {tensor.name: FORMATS[name].fitting(tensor.n_cols).name for tensor in tensors}


def count_runs(model: Model, n_groups: int | None) -> int:
    """Evaluations that `measure_sensitivity` makes."""
    return len(list_groups(model, n_groups)) + len(WHOLE)


def measure_sensitivity(
    runs: Runs, n_groups: int | None = None, source: str = "measured", progress: Progress | None = None
) -> str:
    """A table for `read_sensitivity`, as TOML: every group in the probe format, and the whole model in every format.

    A group's figure is shared out over its tensors alike; one that the noise made negative or zero is a thousandth of
    the smallest other one.
    """
    model = open_unfused(runs.reference)
    groups = list_groups(model, n_groups)
    total, figures = len(groups) + len(WHOLE), {}
    for done, group in enumerate(groups, start=1):
        figures[group] = runs.measure(group.name, _types(group.tensors, PROBE))
        if progress is not None:
            progress(done, total)
    everything = [tensor for group in groups for tensor in group.tensors]
    whole = {}
    for done, name in enumerate(WHOLE, start=1 + len(groups)):
        whole[name] = runs.measure(f"whole {name}", _types(everything, name))
        if progress is not None:
            progress(done, total)
    least = min((value for value in figures.values() if value > 0), default=1.0) / 1000
    lines = ["schema = 1", f"source = {json.dumps(source)}", "", "[[measured]]", f"model = {json.dumps(source)}"]
    lines += [f"n_weights = {model.n_weights}", f"n_layer = {model.sizes['n_layer']}"]
    lines += [f'probe = "{PROBE}"', "", "[measured.whole_model]"]
    lines += [f"{name} = {value:.6g}" for name, value in whole.items() if value > 0]
    for role in dict.fromkeys(group.role for group in groups):
        own = [group for group in groups if group.role is role]
        layers = [layer for group in own for layer in group.layers]
        loss = [max(figures[g], least) / max(1, len(g.layers)) for g in own for _ in g.layers or (0,)]
        lines += ["", f"[measured.roles.{role.value}]"]
        lines += [f"layers = {layers}"] if layers else []
        lines.append(f"loss = [{', '.join(f'{value:.4g}' for value in loss)}]")
    return "\n".join(lines) + "\n"


def recalibrate(
    runs: Runs, table: LossTable, plain: LossTable, progress: Progress | None = None
) -> tuple[LossTable, dict[Role, tuple[float, float]]]:
    """The table with a multiplier for each role: what one run of the role in the probe format says of the prediction.

    Args:
        runs: of the same model.
        table: to be corrected.
        plain: predictions for plain rounding, with the probe format.
        progress: told after each run.

    Returns:
        The table, and role -> (predicted, measured).
    """
    found: dict[Role, tuple[float, float]] = {}
    groups = list_groups(open_unfused(runs.reference), 1)
    for done, group in enumerate(groups, start=1):
        types = _types(group.tensors, PROBE)
        known = [tensor for tensor in group.tensors if plain.has(tensor, types[tensor.name])]
        if len(known) == len(group.tensors):
            predicted = sum(plain.loss(tensor, types[tensor.name]) for tensor in group.tensors)
            found[group.role] = (predicted, runs.measure(group.name, types))
        if progress is not None:
            progress(done, len(groups))
    multipliers = {
        role: min(max(measured / predicted, LEAST), MOST) for role, (predicted, measured) in found.items() if predicted
    }
    source = f"{table.source}, multiplied by {len(multipliers)} runs of single roles"
    return LossTable(source, table.model_sha256, table.losses, multipliers), found
