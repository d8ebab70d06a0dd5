"""What two GGUF files of one model differ in: types and bytes, metadata, weights, and what they say about a text.

Neither is a reference here: two quantizations of a checkpoint, or a file before and after a change. The divergence is
measured in both directions, since KL(first || second) weighs what the first holds likely, and the other what the
second does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pocketquant.eval.compare import compare
from pocketquant.eval.kinship import check_architecture
from pocketquant.eval.report.schema import Report
from pocketquant.eval.weights import weight_errors
from pocketquant.formats import FORMATS
from pocketquant.gguf_file.identity import FileIdentity, identify_model
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_shards
from pocketquant.model import Model, Tensor, Value
from pocketquant.texts.corpus import Text

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TensorForm:
    """One tensor in one of the files: its shape, its type, its bytes."""

    shape: tuple[int, ...]
    format: str
    nbytes: int


@dataclass(frozen=True)
class TensorPair:
    """One tensor in both files.

    Attributes:
        first, second: how each stores it; None where it has no such tensor.
        relative_difference: root of the sum of squared differences over that of the first file's squares; 0 where the
            weights are equal, None where one has no such tensor, the shapes differ, or only the first is all zeros.
    """

    name: str
    role: str
    first: TensorForm | None
    second: TensorForm | None
    relative_difference: float | None

    @property
    def is_equal(self) -> bool:
        """Whether both files hold the same weights in the same type."""
        return self.first == self.second and self.relative_difference == 0


@dataclass(frozen=True)
class MetadataPair:
    """A metadata key whose value or type differs; None where a file does not have it."""

    key: str
    first: Value | None
    second: Value | None


@dataclass(frozen=True)
class Directions:
    """What the two say about the same texts: KL(first || second), where the first is the reference, and the reverse."""

    first_to_second: Report
    second_to_first: Report


@dataclass(frozen=True)
class FileDifference:
    """Two files side by side; `divergence` is None where no text was given."""

    first: FileIdentity
    second: FileIdentity
    tensors: tuple[TensorPair, ...]
    metadata: tuple[MetadataPair, ...]
    divergence: Directions | None

    def bytes_by_type(self) -> dict[str, tuple[int, int]]:
        """Bytes of tensor data of each type in the first file and in the second, most first."""
        totals: dict[str, list[int]] = {}
        for pair in self.tensors:
            for place, stored in enumerate((pair.first, pair.second)):
                if stored is not None:
                    totals.setdefault(stored.format, [0, 0])[place] += stored.nbytes
        return {name: (a, b) for name, (a, b) in sorted(totals.items(), key=lambda item: -max(item[1]))}

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; of the divergence, the numbers without the runs' details."""
        found: dict[str, Any] = {
            "first": asdict(self.first),
            "second": asdict(self.second),
            "bytes_by_type": {name: {"first": a, "second": b} for name, (a, b) in self.bytes_by_type().items()},
            "metadata": [asdict(pair) for pair in self.metadata],
            "tensors": [asdict(pair) for pair in self.tensors],
            "divergence": None,
        }
        if self.divergence is not None:
            reports = {
                "first_to_second": self.divergence.first_to_second.to_json(),
                "second_to_first": self.divergence.second_to_first.to_json(),
            }
            kept = ("metrics", "tokens", "windows", "non_finite")
            found["divergence"] = {name: {key: report[key] for key in kept} for name, report in reports.items()}
        return found


def find_differences(
    first: Path, second: Path, *, progress: Progress | None = None, divergence: Directions | None = None
) -> FileDifference:
    """Compares two GGUF files of one architecture without running them.

    Args:
        first: a GGUF, or the first of its shards.
        second: another.
        progress: told after each tensor that both have.
        divergence: of the two, from `measure_both_ways`, to be part of the result.

    Raises:
        EvalError: the architectures differ.
        GgufError: one of them is no model.
        SourceError: a tensor cannot be read, or is not finite.
    """
    check_architecture(second, first)
    models = open_gguf(first), open_gguf(second)
    ours, theirs = ({tensor.name: tensor for tensor in model.tensors} for model in models)
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    errors = weight_errors(_only(models[1], shared), _only(models[0], shared), progress=progress)
    distances = {error.name: error.relative_rmse for error in errors}
    pairs = tuple(
        TensorPair(
            name,
            (ours.get(name) or theirs[name]).role.value,
            _stored(ours.get(name)),
            _stored(theirs.get(name)),
            distances.get(name),
        )
        for name in [*ours, *(name for name in theirs if name not in ours)]
    )
    return FileDifference(identify_model(first), identify_model(second), pairs, _metadata_of(first, second), divergence)


def measure_both_ways(
    first: Path,
    second: Path,
    texts: Sequence[Text],
    *,
    context: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    progress: Progress | None = None,
) -> Directions:
    """Runs both files over texts twice, each time with the other one as the reference; arguments as of `compare`."""

    def half(begun: int) -> Progress:
        """Progress of one of the two runs, as a half of the whole."""

        def step(done: int, total: int) -> None:
            if progress is not None:
                progress(begun * total + done, 2 * total)

        return step

    settings: dict[str, Any] = {"context": context, "chunks": chunks, "threads": threads, "gpu_layers": gpu_layers}
    return Directions(
        compare(second, first, texts, **settings, progress=half(0)),
        compare(first, second, texts, **settings, progress=half(1)),
    )


def _only(model: Model, names: Sequence[str]) -> Model:
    tensors = {tensor.name: tensor for tensor in model.tensors}
    return replace(model, tensors=tuple(tensors[name] for name in names))


def _stored(tensor: Tensor | None) -> TensorForm | None:
    if tensor is None:
        return None
    return TensorForm(tensor.shape, tensor.dtype, tensor.n_rows * FORMATS[tensor.dtype].row_bytes(tensor.n_cols))


def _metadata_of(first: Path, second: Path) -> tuple[MetadataPair, ...]:
    """Keys that differ, as they stand in the files; how a file is cut into shards is no part of it."""
    ours, theirs = (read_shards(path)[0][1].metadata for path in (first, second))
    keys = [key for key in {**ours, **theirs} if not key.startswith("split.") and ours.get(key) != theirs.get(key)]
    return tuple(MetadataPair(key, ours.get(key), theirs.get(key)) for key in keys)
