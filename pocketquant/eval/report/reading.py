"""A report, read back: what `eval --json` printed, checked before a number of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError, listing
from pocketquant.eval.intervals import F64Array
from pocketquant.eval.report.kinds import RELEASE, REPORT
from pocketquant.eval.report.schema import SCHEMA
from pocketquant.files.json_kinds import refuse_other_kinds

COLUMNS = ("tokens", "bytes", "kld", "top1", "top5", "tv", "nll_model", "nll_reference")
RELEASES = ("pocketquant.make/1", "pocketquant.sweep/1")
_MAX_FILES = 256
MAX_CLUSTERS = 1 << 20
_MAX_TENSORS = 1 << 16
_LARGEST = 1e100  # whose squares and sums are finite, too
_MOST = 1 << 40


@dataclass(frozen=True)
class ReadSums:
    """One text's sums over clusters: name -> f64[n_cluster], all of one length."""

    domain: str
    stream: str
    columns: Mapping[str, F64Array]

    def column(self, name: str) -> F64Array:
        """One of `COLUMNS`, or "bits": how many more than the reference."""
        if name == "bits":
            return (self.columns["nll_model"] - self.columns["nll_reference"]) / np.log(2)
        return self.columns[name]


@dataclass(frozen=True)
class TensorRecord:
    """One tensor; errors are infinite where the reference is all zero and the model is not."""

    name: str
    role: str
    layer: int | None
    format: str
    weights: int
    sha256: str
    relative_rmse: float | None
    max_abs_error: float | None

    def error(self, field: str, path: str) -> float:
        """ "relative_rmse" or "max_abs_error"; EvalError where the report has none."""
        value: float | None = getattr(self, field)
        if value is None:
            raise EvalError(
                f"{path}: no error of {self.name}; run `eval --weights` with the full-precision file as the reference"
            )
        return value


@dataclass(frozen=True)
class Evidence:
    """A report and where it was read from, for messages.

    Attributes:
        sums: of each text; empty in reports that have none.
        tensors: None where `eval --weights` was not asked for.
    """

    path: str
    data: Mapping[str, Any]
    sums: tuple[ReadSums, ...]
    tensors: tuple[TensorRecord, ...] | None

    @property
    def provenance(self) -> Mapping[str, Any]:
        return as_object(self.data.get("provenance"))

    @property
    def versions(self) -> Mapping[str, Any]:
        """Of the software that measured."""
        return as_object(self.provenance.get("versions"))

    @property
    def model(self) -> tuple[str, str]:
        """Name and digest of the judged file."""
        found = as_object(self.provenance.get("model"))
        return str(found.get("name")), str(found.get("sha256"))

    @property
    def metadata(self) -> Mapping[str, str]:
        """Digests of the judged file's metadata, by key."""
        return as_object(self.provenance.get("model_metadata"))

    def number(self, *keys: str) -> float:
        """The number at `keys`; EvalError if it is missing or none."""
        value: Any = self.data
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if not _is_number(value):
            raise EvalError(
                f"{self.path}: {'.'.join(keys)} is {value!r}, not a number that a limit can be held against; "
                "measure on more text, or take the limit out"
            )
        return float(value)

    def count(self, key: str) -> int:
        """The whole number at `key`, from 1 to what a report can hold; EvalError if it is none."""
        value = self.number(key)
        if not 1 <= value <= _MOST or value != int(value):
            raise EvalError(f"{self.path}: {key} is {value!r:.40}, which cannot be measured; measure again")
        return int(value)

    def need_sums(self) -> tuple[ReadSums, ...]:
        """The sums of each text; EvalError if there are none."""
        if not self.sums:
            raise EvalError(f"{self.path}: holds no sums by window; measure again with this version")
        return self.sums

    def need_tensors(self) -> tuple[TensorRecord, ...]:
        """What each tensor lost; EvalError if the report does not say."""
        if self.tensors is None:
            raise EvalError(f"{self.path}: says nothing about tensors; measure again with `eval --weights`")
        return self.tensors

    def texts(self, domain: str | None) -> list[ReadSums]:
        """The texts of one domain, or all."""
        found = [text for text in self.need_sums() if domain in (None, text.domain)]
        if not found:
            raise EvalError(f"{self.path}: no text of the domain {domain}")
        return found


def choose_file(data: Any, path: str, file: str | None) -> Any:
    """One measurement of a report of `make` or `sweep`, as `eval --json --weights` would have printed it.

    Raises:
        EvalError: the report holds several files and none is named, or none of that name.
    """
    if not isinstance(data, Mapping) or data.get("schema") not in RELEASES:
        if file is not None:
            raise EvalError(f"{path}: a measurement of one file, so there is none to choose; leave --file out")
        return data
    refuse_other_kinds(data, RELEASE, path, EvalError)
    entries = _list(data.get("variants"), path, "variants", _MAX_FILES)
    found = [each for each in entries if file is None or file in (each.get("file"), each.get("recipe"))]
    if len(found) != 1 or not isinstance(found[0].get("evaluation"), Mapping):
        names = listing(f"{each.get('file')} ({each.get('recipe')})"[:200] for each in entries)
        raise EvalError(f"{path}: say which file by --file NAME or its recipe; it holds:\n{names}")
    weights = [_as_state(each) for each in _list(found[0].get("weights") or [], path, "weights", _MAX_TENSORS)]
    return {**found[0]["evaluation"], **({"tensors": weights} if weights else {})}


def _as_state(tensor: Any) -> Any:
    """A tensor's error as `eval --weights` shows it. There is no digest: equal errors count as the same bytes."""
    if not isinstance(tensor, Mapping):
        return tensor
    known = [tensor.get(key) for key in ("format", "relative_rmse", "max_abs_error", "cosine")]
    return {**tensor, "weights": 0, "sha256": repr(known)}


def as_object(found: Any) -> Mapping[str, Any]:
    """An object; an empty one for anything else."""
    return found if isinstance(found, Mapping) else {}


def parse_report(data: Any, path: str) -> Evidence:
    """Checks parsed JSON.

    Raises:
        EvalError: it is no report, or its sums or tensors are not what they should be.
    """
    if not isinstance(data, Mapping) or data.get("schema") != SCHEMA or not isinstance(data.get("metrics"), Mapping):
        raise EvalError(f"{path}: no report of the schema {SCHEMA}; give what `pocketquant eval --json` printed")
    refuse_other_kinds(data, REPORT, path, EvalError)
    tensors = data.get("tensors")
    return Evidence(
        path=path,
        data=data,
        sums=tuple(_text(each, path) for each in _list(data.get("sums") or [], path, "sums", _MAX_TENSORS)),
        tensors=None
        if tensors is None
        else tuple(_tensor(each, path) for each in _list(tensors, path, "tensors", _MAX_TENSORS)),
    )


def same_tokens(
    ours: Sequence[ReadSums], theirs: Sequence[ReadSums]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which clusters of the texts, one after the other, are the same tokens: indices i64[n] of both."""
    starts, at = {}, 0
    for text in theirs:
        starts[text.domain, text.stream] = at, text
        at += len(text.column("tokens"))
    left, right, at = [], [], 0
    for text in ours:
        n = len(text.column("tokens"))
        start, other = starts.get((text.domain, text.stream), (0, None))
        if text.stream and other is not None and len(other.column("tokens")) == n:
            left.append(np.arange(at, at + n))
            right.append(np.arange(start, start + n))
        at += n
    none = np.zeros(0, np.int64)
    return np.concatenate([none, *left]), np.concatenate([none, *right])


def _text(value: Any, path: str) -> ReadSums:
    if not isinstance(value, Mapping):
        raise _broken(path, "a text's sums")
    columns = {}
    for name in COLUMNS:
        numbers = _list(value.get(name), path, f"sums.{name}", MAX_CLUSTERS)
        if not all(_is_number(number) for number in numbers):
            raise _broken(path, f"sums.{name}")
        columns[name] = np.array(numbers, np.float64)
    if len({len(numbers) for numbers in columns.values()}) != 1 or (columns["tokens"] < 0).any():
        raise _broken(path, "sums of unlike lengths")
    return ReadSums(str(value.get("domain")), str(value.get("stream") or ""), columns)


def _tensor(value: Any, path: str) -> TensorRecord:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise _broken(path, "a tensor without a name")
    name, layer, weights, cosine = (value.get(key) for key in ("name", "layer", "weights", "cosine"))
    rmse, largest = value.get("relative_rmse"), value.get("max_abs_error")
    if not _is_number(weights) or not all(each is None or _is_number(each) for each in (layer, rmse, largest)):
        raise _broken(path, f"the numbers of {name}")
    if rmse is None and cosine is not None:
        rmse = math.inf
    return TensorRecord(
        name=str(name),
        role=str(value.get("role")),
        layer=None if layer is None else int(layer),
        format=str(value.get("format")),
        weights=int(weights or 0),
        sha256=str(value.get("sha256")),
        relative_rmse=rmse,
        max_abs_error=largest,
    )


def _list(value: Any, path: str, what: str, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise _broken(path, what)
    return value


def _is_number(value: Any) -> bool:
    """A number that f64 holds; an integer in JSON may be of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _broken(path: str, what: str) -> EvalError:
    return EvalError(f"{path}: damaged: {what} cannot be read; measure again with `pocketquant eval --json`")
