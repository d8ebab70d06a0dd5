"""Reference packs without a runtime: the file format, the codings of hidden states, and the most likely tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_maker import reseal

from pocketquant.errors import EvalError, OutputError
from pocketquant.eval.metrics import score_rows
from pocketquant.eval.packs.kept_rows import fitting_codings
from pocketquant.eval.packs.pack import (
    MAGIC,
    Floor,
    HeadIdentity,
    Pack,
    PackHeader,
    PackWriter,
    TextIdentity,
    is_pack,
    read_pack,
)
from pocketquant.eval.packs.pack_error import FloorMeter
from pocketquant.eval.packs.replay import open_pack
from pocketquant.eval.packs.states import CODINGS, Head, decode_states, encode_states, row_bytes
from pocketquant.eval.packs.top_k import check_top, decode_top, encode_top, row_dtype
from pocketquant.eval.reference import base_file_bytes, describe_reference
from pocketquant.formats import FORMATS, F32Array
from pocketquant.gguf_file.identity import FileIdentity
from pocketquant.model import Role, Tensor

N_EMBD, N_VOCAB, CONTEXT, WINDOWS = 64, 96, 16, 3


class ArrayRows:
    """Rows of an array."""

    def __init__(self, array: F32Array) -> None:
        self.array = array

    def rows(self, start: int, stop: int) -> F32Array:
        return self.array[start:stop]

    def stored(self, start: int, stop: int) -> None:
        return None


def make_head(dtype: str = "BF16") -> tuple[Head, F32Array]:
    values = np.random.default_rng(1).standard_normal((N_VOCAB, N_EMBD)).astype(np.float32)
    values = FORMATS[dtype].decode(FORMATS[dtype].encode(values), N_EMBD)
    return Head(Tensor("output.weight", Role.HEAD, None, values.shape, dtype, ArrayRows(values))), values


def make_pack(path: Path, **changes: Any) -> tuple[F32Array, np.ndarray]:
    """A pack of states with its matrix in it; the states f32 and the windows that are in it."""
    random = np.random.default_rng(2)
    windows = random.integers(0, N_VOCAB, (WINDOWS, CONTEXT)).astype(np.int32)
    states = random.standard_normal((WINDOWS * 7, N_EMBD)).astype(np.float32)
    head, _ = make_head()
    header = PackHeader(
        kind="states",
        model=FileIdentity("model.gguf", 1000, "ab" * 32),
        sizes={"n_layer": 2, "n_embd": N_EMBD},
        vocabulary="cd" * 32,
        n_vocab=N_VOCAB,
        bos=None,
        context=CONTEXT,
        first_scored=8,
        texts=(TextIdentity("a.txt", 10, "ef" * 32, 2, 40), TextIdentity("b.txt", 10, "01" * 32, 1, 20)),
        row_bytes=row_bytes("bf16", N_EMBD),
        coding="bf16",
        head=head.identify(),
        top=0,
        floor=Floor(1e-13, 2e-12, 3e-9, 1.0, 21),
        versions={"llama_cpp": "1"},
    )
    with PackWriter(path) as writer:
        writer.add("tokens", windows.view(np.uint8))
        for start in range(0, len(states), 5):
            writer.add("rows", encode_states("bf16", states[start : start + 5]))
        for piece in head.stored_bytes():
            writer.add("head", piece)
        writer.finish(replace(header, **changes))
    return states, windows


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_takes_no_more_is_said_with_the_packs_name(tmp_path: Path) -> None:
    (tmp_path / "full.pqref").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"full\.pqref: cannot be written: No space left on device"):
        with PackWriter(tmp_path / "full.pqref") as writer:
            writer.add("tokens", np.zeros(1 << 20, np.uint8))


def test_a_pack_gives_back_what_was_put_in(tmp_path: Path) -> None:
    path = tmp_path / "a.pqref"
    states, windows = make_pack(path)
    assert is_pack(path)
    pack = read_pack(path)
    assert (pack.header.n_window, pack.header.scored_per_window, pack.header.positions) == (3, 7, 21)
    assert np.array_equal(pack.windows(), windows)
    expected = decode_states("bf16", encode_states("bf16", states), N_EMBD)
    assert np.array_equal(decode_states("bf16", pack.rows(1, 2, 5), N_EMBD), expected[9:12])
    _, matrix = make_head()
    with open_pack(path) as runtime:
        for window, tokens in enumerate(windows):
            for first in (8, 11):
                groups = list(runtime.logits(tokens[:-1].tolist(), first=first))
                assert [start for start, _ in groups] == [first]
                rows = expected[7 * window + first - 8 : 7 * window + 7]
                np.testing.assert_allclose(groups[0][1], rows @ matrix.T, rtol=1e-5, atol=1e-5)


def test_a_pack_says_that_its_reference_is_quantized(tmp_path: Path) -> None:
    make_pack(tmp_path / "full.pqref")
    make_pack(tmp_path / "rounded.pqref", quantized="100 % Q8_0")
    assert read_pack(tmp_path / "rounded.pqref").header.quantized == "100 % Q8_0"
    assert (describe_reference(tmp_path / "rounded.pqref") or {})["quantized"] == "100 % Q8_0"
    assert read_pack(tmp_path / "full.pqref").header.quantized == ""
    assert b"quantized" not in (tmp_path / "full.pqref").read_bytes()
    assert "quantized" not in (describe_reference(tmp_path / "full.pqref") or {})


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    make_pack(tmp_path / "a.pqref")
    make_pack(tmp_path / "b.pqref")
    assert (tmp_path / "a.pqref").read_bytes() == (tmp_path / "b.pqref").read_bytes()


def test_every_cut_and_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pqref"
    make_pack(path)
    whole = path.read_bytes()
    bad = tmp_path / "bad.pqref"
    for length in [*range(60), *range(60, len(whole), 37), len(whole) - 1]:
        bad.write_bytes(whole[:length])
        with pytest.raises(EvalError, match=r"bad\.pqref"):
            read_pack(bad)
    for place in [*range(56), *range(56, len(whole), 101)]:
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(EvalError, match=r"bad\.pqref"):
            read_pack(bad)
    bad.write_bytes(whole + b"more")
    with pytest.raises(EvalError, match="damaged or cut short"):
        read_pack(bad)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "rows beyond the file": lambda f: f["sections"]["rows"].update(nbytes=1 << 40),
    "sections on top of each other": lambda f: f["sections"]["rows"].update(offset=56),
    "negative offset": lambda f: f["sections"]["tokens"].update(offset=-8),
    "more windows": lambda f: f["texts"][0].update(windows=1 << 23),
    "no texts": lambda f: f.update(texts=[]),
    "texts is a number": lambda f: f.update(texts=5),
    "huge context": lambda f: f.update(context=1 << 60),
    "context as text": lambda f: f.update(context="16"),
    "context as bool": lambda f: f.update(context=True),
    "scored from behind": lambda f: f.update(first_scored=15),
    "tokens beyond the vocabulary": lambda f: f.update(n_vocab=5),
    "another kind": lambda f: f.update(kind="other"),
    "states as top": lambda f: f.update(kind="top"),
    "top of states": lambda f: f.update(top=64),
    "no matrix": lambda f: f.update(head=None),
    "no floor": lambda f: f.pop("floor"),
    "floor is NaN": lambda f: f["floor"].update(kld_mean=float("nan")),
    "unknown section": lambda f: f["sections"].update(more={"offset": 0, "nbytes": 0, "sha256": "0" * 64}),
    "sections is a list": lambda f: f.update(sections=[]),
    "unknown coding": lambda f: f.update(coding="../x"),
    "coding of another size": lambda f: f.update(coding="q8_0"),
    "matrix in an unknown type": lambda f: f["head"].update(format="Q9"),
    "matrix of another width": lambda f: f["head"].update(n_embd=32),
    "matrix of another digest": lambda f: f["head"].update(sha256="0" * 64),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pqref"
    make_pack(path)
    path.write_bytes(reseal(path.read_bytes(), HOSTILE[name]))  # type: ignore[arg-type]
    with pytest.raises(EvalError, match=r"a\.pqref: .*(make it again|fetch it again)"), open_pack(path):
        pass


def test_other_files_and_versions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pqref"
    path.write_bytes(b"GGUF" + bytes(100))
    assert not is_pack(path)
    with pytest.raises(EvalError, match="no reference pack"):
        read_pack(path)
    path.write_bytes(MAGIC[:7] + b"\2" + bytes(100))
    with pytest.raises(EvalError, match="another version"):
        read_pack(path)
    with pytest.raises(EvalError, match="cannot be read"):
        read_pack(tmp_path / "absent.pqref")


@pytest.mark.parametrize("coding", CODINGS)
def test_codings_round_to_nearest_and_keep_what_they_hold(coding: str) -> None:
    states = (np.random.default_rng(3).standard_normal((9, 96)) * np.logspace(-3, 2, 96)).astype(np.float32)
    coded = encode_states(coding, states)
    assert coded.shape == (9, row_bytes(coding, 96))
    given = decode_states(coding, coded, 96)
    assert np.array_equal(encode_states(coding, given), coded)
    if coding == "q8_0":
        largest = np.abs(states).reshape(9, 3, 32).max(axis=2, keepdims=True)
        assert (np.abs(given - states).reshape(9, 3, 32) <= largest / 127 * 0.6).all()
    else:
        bits = {"f24": 16, "bf16": 8, "f16": 11}[coding]
        # half a step; 2^-25 is half the least step of f16
        assert (np.abs(given - states) <= np.maximum(np.abs(states) * 2.0**-bits, 2.0**-25)).all()


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_broken_state_stays_broken(coding: str, broken: float) -> None:
    states = np.random.default_rng(4).standard_normal((3, 64)).astype(np.float32)
    states[1, 7] = broken
    given = decode_states(coding, encode_states(coding, states), 64)
    assert np.isnan(given[1]).all()
    assert np.isfinite(given[[0, 2]]).all()


def test_a_matrix_is_the_same_kept_or_decoded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    states = np.random.default_rng(5).standard_normal((4, N_EMBD)).astype(np.float32)
    kept, _ = make_head()
    monkeypatch.setattr("pocketquant.eval.packs.states.CACHED_BYTES", 0)
    monkeypatch.setattr("pocketquant.eval.packs.states._HEAD_BYTES", 4 * N_EMBD * 7)
    anew, _ = make_head()
    assert anew.identify() == kept.identify() == HeadIdentity("output.weight", "BF16", N_EMBD, kept.identify().sha256)
    np.testing.assert_allclose(anew.logits(states), kept.logits(states), atol=1e-5)


def random_logits(n: int, n_vocab: int, seed: int) -> F32Array:
    return (np.random.default_rng(seed).standard_normal((n, n_vocab)) * 3).astype(np.float32)


def log_softmax(rows: F32Array) -> np.ndarray:
    wide = rows.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("n_vocab", [300, 70_001])
def test_top_tokens_give_the_divergence_over_classes(n_vocab: int) -> None:
    top, n = 16, 6
    reference, noise = random_logits(n, n_vocab, 1), random_logits(n, n_vocab, 2) / 10
    model = reference + noise
    after = np.array([int(np.argmax(reference[0])), *range(5, 5 * n, 5)], np.int32)
    rows = decode_top(encode_top(reference, after, top), after, n_vocab, top)
    scored = score_rows(model, rows.completed(model), after)
    p, q = log_softmax(reference), log_softmax(model)
    whole = score_rows(model, reference, after)
    for i in range(n):
        kept = np.zeros(n_vocab, bool)
        kept[np.argsort(-reference[i])[:top]] = True
        kept[after[i]] = True
        rest_p, rest_q = np.exp(p[i][~kept]).sum(), np.exp(q[i][~kept]).sum()
        classes = (np.exp(p[i]) * (p[i] - q[i]))[kept].sum() + rest_p * np.log(rest_p / rest_q)
        variation = (np.abs(np.exp(p[i]) - np.exp(q[i]))[kept].sum() + abs(rest_p - rest_q)) / 2
        assert scored["kld_nats"][i] == pytest.approx(classes, abs=1e-4)
        assert scored["kld_nats"][i] <= whole["kld_nats"][i] + 1e-4
        assert scored["variation"][i] == pytest.approx(variation, abs=1e-3)
    np.testing.assert_allclose(scored["nll_reference_nats"], whole["nll_reference_nats"], atol=1e-3)
    np.testing.assert_allclose(scored["nll_model_nats"], whole["nll_model_nats"], atol=1e-9)
    assert np.array_equal(scored["is_same_top"], whole["is_same_top"])
    assert np.array_equal(scored["n_above_top"], whole["n_above_top"])


def test_broken_rows_are_counted_on_the_side_that_is_broken() -> None:
    reference, model = random_logits(4, 100, 3), random_logits(4, 100, 4)
    reference[1, 3] = np.nan
    model[2, 5] = np.inf
    after = np.arange(4, dtype=np.int32)
    rows = decode_top(encode_top(reference, after, 8), after, 100, 8)
    scored = score_rows(model, rows.completed(model), after)
    assert scored["is_finite_reference"].tolist() == [True, False, True, True]
    assert scored["is_finite_model"].tolist() == [True, True, False, True]


def test_impossible_probabilities_are_refused() -> None:
    after = np.zeros(2, np.int32)
    good = encode_top(random_logits(2, 100, 5), after, 8)
    decode_top(good, after, 100, 8)
    changes: dict[str, Any] = {"tokens": 100, "logs": 0, "rest": np.inf, "next": np.float32(1.0)}
    for name, value in changes.items():
        rows = good.copy().reshape(-1).view(row_dtype(100, 8))
        rows[name][1] = value
        with pytest.raises(EvalError, match="impossible probabilities"):
            decode_top(rows.view(np.uint8).reshape(2, -1), after, 100, 8)
    for top in (0, 7, 99, 5000):
        with pytest.raises(EvalError, match="--top-k"):
            check_top(top, 100)


def test_the_floor_is_infinite_where_a_pack_misleads() -> None:
    live = random_logits(5, 50, 6)
    meter = FloorMeter()
    meter.add(live, lambda _: live)
    floor = meter.floor()
    assert (floor.kld_max, floor.shift, floor.captured, floor.positions) == (0, 0, 1, 5)
    given = live.copy()
    given[2, 2] = np.nan
    meter.add(live, lambda _: given)
    assert meter.floor().kld_mean == np.inf


def test_sizes_of_real_models() -> None:
    # n_embd of 0.8B, 4B and 9B at 248,320 tokens; F32 states alone would be 0.82, 2.06 and 3.3 %
    base = base_file_bytes(248_320, 32, 512, 255)
    assert base == 8 + 12 + 4 * 32 * 512 + 32 * 255 * 2 * 248_324
    for n_embd, best in ((1024, "f24"), (2560, "f24"), (4096, "bf16")):
        fitting = fitting_codings(n_embd, 248_320)
        assert fitting[0] == best
        for coding in fitting:
            assert 4 * 32 * 512 + 32 * 255 * row_bytes(coding, n_embd) < 0.02 * base
    assert fitting_codings(64, 1000) == CODINGS
    assert row_dtype(248_320, 64).itemsize * 8160 < 4e6


def test_a_window_that_is_not_in_the_pack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pqref"
    _, windows = make_pack(path)
    with open_pack(path) as runtime:
        with pytest.raises(EvalError, match="no such window"):
            next(runtime.logits(windows[0][::-1][:-1].tolist(), first=8))
        with pytest.raises(EvalError, match="from position 3 on"):
            next(runtime.logits(windows[0][:-1].tolist(), first=3))
        with pytest.raises(EvalError, match="cannot read text"):
            runtime.tokenize("words")
    with pytest.raises(EvalError, match=r"windows of 16 tokens, 32 were asked for; use --context 16"):
        open_pack(path, context=32).__enter__()
    assert isinstance(read_pack(path), Pack)
