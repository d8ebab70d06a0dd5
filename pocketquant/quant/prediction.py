"""What every tensor is predicted to lose in every format, from statistics of this very model: one pass, no runs.

With gradients the prediction is absolute: an error D of a weight costs 0.5 tr(G D H D^T) nats a token, a row of the
output head 0.5 d^T M d, a row of the embedding 0.5 frequency d^T E d (`statistics` says what these are). D is the error
of the rounder that will write the file. Without gradients nobody knows what an output's error costs; then the loss of a
tensor in plain Q4_K is taken from a table of sensitivities, and statistics say how much less another format or another
rounder leaves of it: loss = sensitivity * tr(D H D^T) / tr(D0 H D0^T), D0 the error of plain Q4_K (IQ4_NL or Q8_0 where
rows do not fit). The head needs no gradients either way.

Rows that are rounded on their own are sampled where a tensor is large; what a sample says is multiplied up. What a
rounder gains over plain rounding hardly depends on the format (within a tenth for all tensors of two models), so it is
run for one format and the others' plain errors are scaled, unless asked otherwise.

llama.cpp's CPU kernels round activations too: to 8 bits with one scale for 256 columns beside K-quants and IQ4_XS, for
32 beside the other block formats, none beside F16 (`activations`). At 5 bits and more that costs as much as the weights
do, so a choice of types should know: `activations` adds 0.5 sum_j v_j (W^T G W)_jj, v_j the mean squared error of a
column, from the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pocketquant.calibration.statistics import HEAD, HeadStatistics, Statistics, check_statistics
from pocketquant.formats import FORMATS, F32Array, offered_formats
from pocketquant.formats.activations import FINE
from pocketquant.gguf_file.writing import encode_rows
from pocketquant.model import Model, Role, RowEncoder, Tensor
from pocketquant.quant.applying import apply_recipe
from pocketquant.quant.loss_table import LossTable
from pocketquant.quant.recipe import Recipe
from pocketquant.quant.rounding.encoding import STEPS, with_rounding
from pocketquant.quant.rounding.rows import DEFAULT, Rounding
from pocketquant.quant.sensitivity import LossByRole, Sensitivity, read_sensitivity

PREDICTED = tuple(item.name for item in offered_formats() if not item.is_plain)
"""Formats that a table has figures for; F16 and the like lose nothing that counts."""

SAMPLE_WEIGHTS = 1 << 22
"""Weights of a tensor, at most, that are rounded where rows are independent."""

_BASES = ("Q4_K", "IQ4_NL", "Q8_0")
_CHUNK_ROWS = 1024

Progress = Callable[[int, int], None]
"""Called with tensors done and tensors in all."""


@dataclass(frozen=True)
class PredictSettings:
    """How losses are predicted.

    Attributes:
        rounding: how the file's weights will be rounded; None for the formats' own encoders.
        sensitivity: for tensors without gradients; None for the table that comes with the package.
        use_gradients: False to do as if there were none.
        formats: those that get a figure.
        thorough: run the rounder for every format, not for one.
        activations: count what llama.cpp's CPU kernels lose beside each format, too.
    """

    rounding: Rounding | None = DEFAULT
    sensitivity: Sensitivity | None = None
    use_gradients: bool = True
    formats: Sequence[str] = PREDICTED
    thorough: bool = False
    activations: bool = False

    @property
    def applied(self) -> Rounding | None:
        """The rounding that is measured: without gradients no tensor is rounded from both sides."""
        if self.rounding is None or self.use_gradients:
            return self.rounding
        return replace(self.rounding, two_sided=False)


def predict_losses(
    model: Model,
    statistics: Statistics,
    settings: PredictSettings = PredictSettings(),
    progress: Progress | None = None,
) -> LossTable:
    """Predicts the loss of every tensor in every format.

    Args:
        model: the one the statistics were made from.
        statistics: from `open_statistics`.
        settings: how.
        progress: told after each tensor.

    Raises:
        RecipeError: the statistics are of another model.
    """
    check_statistics(statistics, model.tensors)
    tensors = [tensor for tensor in model.tensors if not tensor.keep_f32]
    options = settings.applied
    encoders = {} if options is None else _encoders(model, statistics, options)
    table = settings.sensitivity or read_sensitivity()
    meter = _Meter(model, statistics, settings.use_gradients)
    prior = None if all(meter.is_absolute(tensor) for tensor in tensors) else table.predict(model)
    losses: dict[str, dict[str, float]] = {}
    for done, tensor in enumerate(tensors, start=1):
        losses[tensor.name] = _losses_of(tensor, meter, encoders.get(tensor.name), prior, settings)
        if progress is not None:
            progress(done, len(tensors))
    kind = "with gradients" if meter.has_gradients else f"without gradients, sensitivities of {table.source}"
    steps = next((name for name, known in STEPS.items() if known == options), "plain" if options is None else "own")
    source = f"{statistics.path.name} ({statistics.tokens} tokens, {kind}; rounding: {steps})"
    return LossTable(source, statistics.model_sha256, losses)


def _losses_of(
    tensor: Tensor, meter: _Meter, encoder: RowEncoder | None, prior: LossByRole | None, settings: PredictSettings
) -> dict[str, float]:
    """Format -> predicted loss of one tensor; {} where no format that can be measured fits its rows."""
    fitting = [name for name in settings.formats if FORMATS[name].fits(tensor.n_cols)]
    base = next((name for name in _BASES if FORMATS[name].fits(tensor.n_cols)), None)
    if base is None:
        return {}
    plain, scale = meter.error(tensor, base, None), 1.0
    if encoder is not None and settings.thorough:
        measured = {name: meter.error(tensor, name, encoder) for name in fitting}
    else:
        measured = {name: plain if name == base else meter.error(tensor, name, None) for name in fitting}
        if encoder is not None and plain > 0:
            scale = meter.error(tensor, base, encoder) / plain
    level = 1.0
    if not meter.is_absolute(tensor):
        assert prior is not None
        level = prior.loss(tensor, base) / plain if plain > 0 else 0.0
    losses = {name: value * scale * level for name, value in measured.items()}
    if settings.activations:
        coarse, fine = meter.kernel_errors(tensor)
        for name in losses:
            losses[name] += level * (fine if FORMATS[name].activation_block == FINE else coarse)
    return losses


def _encoders(model: Model, statistics: Statistics, options: Rounding) -> Mapping[str, RowEncoder]:
    """Who rounds each tensor, whatever its format; a plan in Q8_0 has one for every tensor of whole blocks."""
    planned = apply_recipe(model, Recipe("probe", "every tensor in one format", 7, FORMATS["Q8_0"]))
    return with_rounding(planned, statistics, options).rounding


@dataclass(frozen=True)
class _Meter:
    """Measures errors in nats where the statistics suffice, else in the units of the inputs."""

    model: Model
    statistics: Statistics
    use_gradients: bool

    @property
    def has_gradients(self) -> bool:
        return self.use_gradients and self.statistics.has_outputs

    def is_absolute(self, tensor: Tensor) -> bool:
        if tensor.role in (Role.EMBED, Role.HEAD):
            head = self.statistics.head()
            if head is None or len(head.row_group) != tensor.n_rows:
                return False
            if tensor.role is Role.HEAD or self.model.is_tied:
                return True
            return self.has_gradients and head.embed_output is not None
        return self.has_gradients and f"{tensor.name}/output" in self.statistics.entries

    def error(self, tensor: Tensor, name: str, encoder: RowEncoder | None) -> float:
        if tensor.role in (Role.EMBED, Role.HEAD):
            return self._vocabulary(tensor, name, encoder)
        n_matrix = tensor.n_matrix
        return sum(self._matrix(tensor, expert if n_matrix > 1 else None, name, encoder) for expert in range(n_matrix))

    def _matrix(self, tensor: Tensor, expert: int | None, name: str, encoder: RowEncoder | None) -> float:
        rows, statistics = tensor.shape[-2], self.statistics
        has_input = statistics.shared.get(tensor.name, tensor.name) + "/input" in statistics.entries
        inputs = statistics.input(tensor.name, expert) if has_input else None
        outputs = statistics.output(tensor.name, expert) if self.is_absolute(tensor) else None
        if (has_input and inputs is None) or (outputs is None and self.is_absolute(tensor)):
            return 0.0  # an expert that no token came by: nobody knows, nothing is lost on this text
        start = (expert or 0) * rows
        is_whole = outputs is not None or (encoder is not None and encoder.whole)
        if is_whole:
            d = _difference(tensor, start, start + rows, name, encoder)
            right = d if inputs is None else d @ inputs
            if outputs is not None:
                return 0.5 * float(np.sum(outputs * (right @ d.T), dtype=np.float64))
            return float(np.sum(right * d, dtype=np.float64))
        wanted = max(_CHUNK_ROWS // 16, SAMPLE_WEIGHTS // (tensor.n_cols * max(1, tensor.n_matrix)))
        total, seen = 0.0, 0
        for first, last in _sample(rows, wanted):
            d = _difference(tensor, start + first, start + last, name, encoder)
            right = d if inputs is None else d @ inputs
            total, seen = total + float(np.sum(right * d, dtype=np.float64)), seen + last - first
        share = 1.0 if expert is None else statistics.share(tensor.name, expert)
        return total * rows / seen * share

    def kernel_errors(self, tensor: Tensor) -> tuple[float, float]:
        """What rounded activations cost with a scale for 256 columns and for 32, in the units of `error`."""
        if tensor.role in (Role.EMBED, Role.HEAD):
            return self._head_kernel_errors(tensor)
        total, rows, statistics = np.zeros(2), tensor.shape[-2], self.statistics
        name = statistics.shared.get(tensor.name, tensor.name) + "/input"
        if name not in statistics.entries:
            return 0.0, 0.0
        n_matrix = tensor.n_matrix
        for number in range(n_matrix):
            expert = number if n_matrix > 1 else None
            inputs = statistics.input(tensor.name, expert)
            outputs = statistics.output(tensor.name, expert) if self.is_absolute(tensor) else None
            if inputs is None:
                continue
            w = tensor.rows(number * rows, (number + 1) * rows)
            if outputs is None:
                share = 1.0 if expert is None else statistics.share(tensor.name, expert)
                weights = share * np.sum(w * w, axis=0, dtype=np.float64)
            else:
                weights = 0.5 * np.sum(w * (outputs @ w), axis=0, dtype=np.float64)
            total += statistics.rounding(tensor.name, expert) @ weights
        return float(total[0]), float(total[1])

    def _head_kernel_errors(self, tensor: Tensor) -> tuple[float, float]:
        head = self.statistics.head()
        if head is None or len(head.row_group) != tensor.n_rows:
            return 0.0, 0.0
        if tensor.role is Role.EMBED and not self.model.is_tied:  # rows are looked up, nothing is multiplied
            return 0.0, 0.0
        variance = self.statistics.array(HEAD[1])
        weights, seen = np.zeros(tensor.n_cols), 0
        for first, last in _sample(tensor.n_rows, max(_CHUNK_ROWS, SAMPLE_WEIGHTS // tensor.n_cols)):
            w = tensor.rows(first, last).astype(np.float64)
            weights, seen = weights + variance[first:last] @ (w * w), seen + last - first
        coarse, fine = self.statistics.head_rounding() @ weights * (0.5 * tensor.n_rows / seen)
        return float(coarse), float(fine)

    def _vocabulary(self, tensor: Tensor, name: str, encoder: RowEncoder | None) -> float:
        head = self.statistics.head()
        total, seen = 0.0, 0
        for first, last in _sample(tensor.n_rows, max(_CHUNK_ROWS, SAMPLE_WEIGHTS // tensor.n_cols)):
            d = _difference(tensor, first, last, name, encoder)
            seen += last - first
            if head is None or len(head.row_group) != tensor.n_rows:
                total += float(np.sum(d * d, dtype=np.float64))
                continue
            if tensor.role is Role.HEAD or self.model.is_tied:
                total += 0.5 * _head_loss(d, head, slice(first, last))
            if tensor.role is Role.EMBED and self.use_gradients and head.embed_output is not None:
                lost = np.sum((d @ head.embed_output) * d, axis=1, dtype=np.float64)
                total += 0.5 * float(head.frequency[first:last] @ lost)
        return total * tensor.n_rows / seen


def _head_loss(d: F32Array, head: HeadStatistics, rows: slice) -> float:
    groups, scale, total = head.row_group[rows], head.row_scale[rows].astype(np.float64), 0.0
    for group in np.unique(groups):
        chosen = np.flatnonzero(groups == group)
        own = d[chosen]
        lost = np.sum((own @ head.hessian(int(group))) * own, axis=1, dtype=np.float64)
        total += float(scale[chosen] @ lost)
    return total


def _difference(tensor: Tensor, start: int, stop: int, name: str, encoder: RowEncoder | None) -> F32Array:
    kind = FORMATS[name]
    if encoder is None:
        data = encode_rows(replace(tensor, dtype="F32"), start, stop, kind)
    else:
        data = encoder.encode(tensor, start, stop, kind)
    return kind.decode(data, tensor.n_cols) - tensor.rows(start, stop)


def _sample(n_rows: int, wanted: int) -> list[tuple[int, int]]:
    """Row ranges, spread evenly: all rows if they are no more than wanted."""
    if n_rows <= wanted:
        return [(start, min(start + _CHUNK_ROWS, n_rows)) for start in range(0, n_rows, _CHUNK_ROWS)]
    piece = min(64, wanted)
    count = max(1, wanted // piece)
    starts = np.linspace(0, n_rows - piece, count).astype(int)
    return [(int(start), int(start) + piece) for start in starts]
