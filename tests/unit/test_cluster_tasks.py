"""What goes to a cluster's workers: small, whole, nothing twice, every path with what tells its file from another."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from adapter_maker import make_adapter
from checkpoint_maker import make_checkpoint, make_sparse_checkpoint, moe_config
from statistics_maker import make_statistics

from pocketquant import cluster, open_model, open_recipe, plan, write
from pocketquant.calibration.statistics import open_statistics
from pocketquant.convert.sources import open_parts
from pocketquant.errors import SourceError
from pocketquant.gguf_file import writing as pipeline
from pocketquant.model import Plan
from pocketquant.quant.rounding.encoding import with_rounding


def encode_elsewhere(planned: Plan, name: str, rows: slice) -> bytes:
    """Rows of a tensor as a worker gives them: from what was packed."""
    item = next(item for item in planned.tensors if item.tensor.name == name)
    return cluster._encode_piece(cluster.pack(item, planned), rows.start, rows.stop).tobytes()


def encode_here(planned: Plan, name: str, rows: slice) -> bytes:
    item = next(item for item in planned.tensors if item.tensor.name == name)
    importance = planned.importance.get(name)
    return pipeline.encode_rows(item.tensor, rows.start, rows.stop, item.format, importance).tobytes()


@pytest.mark.parametrize("kind", ["checkpoint", "gguf", "experts", "adapter"])
def test_what_is_packed_encodes_to_the_same_bytes(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    if kind == "gguf":
        write(plan(open_model(checkpoint), open_recipe("bf16")), tmp_path / "bf16.gguf")
        model = open_model(tmp_path / "bf16.gguf")
    elif kind == "experts":
        model = open_model(make_checkpoint(tmp_path / "moe", num_experts=moe_config()["num_experts"]))
    elif kind == "adapter":
        model = open_parts(checkpoint, adapter=make_adapter(tmp_path / "adapter", checkpoint)).model
    else:
        model = open_model(checkpoint)
    planned = plan(model, open_recipe("q4_k_m"))
    for item in planned.tensors:
        rows = slice(item.tensor.n_rows // 3, item.tensor.n_rows)
        assert encode_elsewhere(planned, item.tensor.name, rows) == encode_here(planned, item.tensor.name, rows)


def test_rounded_tensors_are_packed_small_with_the_place_of_the_statistics(checkpoint: Path, tmp_path: Path) -> None:
    model = open_model(checkpoint)
    file = make_statistics(model, tmp_path / "s", outputs=["blk.0.ffn_up.weight", "embed/output"], n_group=3)
    planned = with_rounding(plan(model, open_recipe("q4_k_m")), open_statistics(file))
    assert {"token_embd.weight", "blk.0.ffn_up.weight"} < planned.rounding.keys()
    for item in planned.tensors:
        name = item.tensor.name
        encoder = planned.rounding.get(name)
        if encoder is not None and name in ("token_embd.weight", "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"):
            rows = slice(0 if encoder.whole else item.tensor.n_rows // 3, item.tensor.n_rows)
            expected = encoder.encode(item.tensor, rows.start, rows.stop, item.format)
            assert encode_elsewhere(planned, name, rows) == expected.tobytes()
    # a moment of 256 inputs has 131 KB; the vocabulary's groups have 4 bytes a row
    assert max(len(cluster.pack(item, planned)) for item in planned.tensors) < 20_000
    packed = cluster.pack(planned.tensors[-1], planned)
    cluster._unpack.cache_clear()
    make_statistics(model, file, outputs=["blk.0.ffn_up.weight", "embed/output"], n_group=3, salt="other")
    with pytest.raises(SourceError, match=f"{file}: another file than the one planned from"):
        cluster._unpack(packed)


def test_a_matrix_that_is_rounded_whole_is_one_piece(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "BATCH_WEIGHTS", 30_000)
    model = open_model(checkpoint)
    file = make_statistics(model, tmp_path / "s", outputs=["blk.0.ffn_up.weight"])
    planned = with_rounding(plan(model, open_recipe("q4_k_m")), open_statistics(file))
    pieces = [(p.planned.tensor.name, p.start, p.stop) for batch in cluster._batches(planned) for p in batch]
    assert [piece for piece in pieces if piece[0] == "blk.0.ffn_up.weight"] == [("blk.0.ffn_up.weight", 0, 512)]
    assert len([piece for piece in pieces if piece[0] == "blk.0.ffn_gate.weight"]) > 1


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_tensor_is_packed_small_whatever_it_weighs(one_by_one: bool, tmp_path: Path) -> None:
    wide = {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 128,
        "moe_intermediate_size": 512,
    }
    folder = make_sparse_checkpoint(tmp_path / "c", moe_config(**wide), prefix="model.", experts_one_by_one=one_by_one)
    planned = plan(open_model(folder), open_recipe("q4_k_m"))
    sizes = {item.tensor.name: len(cluster.pack(item, planned)) for item in planned.tensors}
    assert max(sizes.values()) < 80_000  # the order of 8,192 rows, or the places of 128 experts
    assert sizes["blk.0.ffn_gate.weight" if "blk.0.ffn_gate.weight" in sizes else "token_embd.weight"] < 1000


def test_batches_cover_every_row_once_and_are_bounded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "BATCH_WEIGHTS", 30_000)
    planned = plan(open_model(checkpoint), open_recipe("q8_0"))
    batches = list(cluster._batches(planned))
    seen = Counter((piece.planned.tensor.name, row) for batch in batches for piece in batch for row in rows_of(piece))
    assert set(seen.values()) == {1}
    assert len(seen) == sum(item.tensor.n_rows for item in planned.tensors)
    weights = [sum((piece.stop - piece.start) * piece.planned.tensor.n_cols for piece in batch) for batch in batches]
    assert max(weights) <= 30_000
    assert all(first + second > 30_000 for first, second in pairwise(weights))


def rows_of(piece: cluster._Piece) -> range:
    return range(piece.start, piece.stop)


def test_a_path_goes_absolute_with_size_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    planned = plan(open_model(Path("c")), open_recipe("q8_0"))
    packed = cluster.pack(planned.tensors[0], planned)
    monkeypatch.chdir("/")
    assert cluster._unpack(packed)[0].rows(0, 1).shape == (1, 256)
    with pytest.raises(pickle.UnpicklingError, match="persistent"):
        pickle.loads(packed)


@pytest.mark.parametrize("place", ["header", "weights", "end"])
def test_another_file_of_the_same_size_is_refused(place: str, tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path / "c") / "model.safetensors"
    planned = plan(open_model(tmp_path / "c"), open_recipe("q8_0"))
    packed = cluster.pack(planned.tensors[0], planned)
    cluster._unpack.cache_clear()
    data = np.frombuffer(file.read_bytes(), np.uint8).copy()
    where = {"header": slice(100, 101), "weights": slice(len(data) // 3, -1), "end": slice(-1, None)}[place]
    data[where] ^= 1
    file.write_bytes(data.tobytes())
    with pytest.raises(SourceError, match=r"model.safetensors: another file than the one planned from"):
        cluster._unpack(packed)


def test_a_copy_of_another_age_is_the_same_file(tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path / "c") / "model.safetensors"
    planned = plan(open_model(tmp_path / "c"), open_recipe("q8_0"))
    packed = cluster.pack(planned.tensors[0], planned)
    cluster._unpack.cache_clear()
    os.utime(file, ns=(1, 1))
    assert cluster._unpack(packed)[1] == planned.tensors[0].format.name
    file.unlink()
    cluster._unpack.cache_clear()
    with pytest.raises(SourceError, match="keep the source on storage that every worker mounts"):
        cluster._unpack(packed)
