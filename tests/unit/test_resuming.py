"""The state of unfinished work: read back as it was written, refused where it is damaged or of another run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pocketquant.errors import EvalError
from pocketquant.files.resuming import check_same_run, open_state, write_state

RUN = {"model": "m", "context": 64, "kernels": {"llama_cpp": "1"}}
ARRAYS = {"sums a": np.arange(6, dtype=np.float32).reshape(2, 3), "counts a": np.array([7])}


def test_a_state_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for arrays in ({}, ARRAYS):  # the second replaces the first
        write_state(path, RUN, arrays)
    with open_state(path, "a test", 1 << 20) as (run, arrays):
        assert run == RUN
        assert set(arrays) == {"run", *ARRAYS}
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], array)
            assert arrays[name].dtype == array.dtype
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "large", "no run", "a list"])
def test_what_is_no_state_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, RUN, ARRAYS)
    data = path.read_bytes()
    if kind == "no run":
        np.savez(tmp_path / "other.npz", **ARRAYS)
        data = (tmp_path / "other.npz").read_bytes()
    if kind == "a list":
        np.savez(tmp_path / "other.npz", run=np.array("[1]"))
        data = (tmp_path / "other.npz").read_bytes()
    path.write_bytes({"cut": data[:-30], "text": b"hello", "empty": b""}.get(kind, data))
    limit = 10 if kind == "large" else 1 << 20
    with (
        pytest.raises(EvalError, match=r"state: not the state of a test \(\w+\); delete it"),
        open_state(path, "a test", limit),
    ):
        raise AssertionError("it was opened")


def test_a_value_that_the_block_misses_is_a_damaged_state(tmp_path: Path) -> None:
    write_state(tmp_path / "state", RUN, {})
    with (
        pytest.raises(EvalError, match=r"not the state of a test \(KeyError\)"),
        open_state(tmp_path / "state", "a test", 1 << 20) as (run, _),
    ):
        run.pop("done")


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    check_same_run(tmp_path, dict(RUN), RUN)
    with pytest.raises(EvalError, match=r"other settings \(context, mtp\); delete it, or repeat the same command"):
        check_same_run(tmp_path, RUN | {"context": 65, "mtp": "x"}, RUN)
