"""Scored positions, their standard errors, and the windows they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pocketquant.errors import EvalError
from pocketquant.eval import bootstrap
from pocketquant.eval.compare import compare
from pocketquant.eval.metrics import score_rows
from pocketquant.eval.report.markdown import to_markdown
from pocketquant.eval.report.schema import Report
from pocketquant.eval.weights import CHUNK_WEIGHTS, weight_errors
from pocketquant.eval.windows import score_windows
from pocketquant.formats import F32Array
from pocketquant.llama.runtime import batch_bounds, default_rows
from pocketquant.model import Model, Role, Tensor
from pocketquant.texts.corpus import cut_corpus, read_text

F64Array = npt.NDArray[np.float64]


def log_softmax(rows: F32Array) -> F64Array:
    wide = rows.astype(np.longdouble)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).astype(np.float64)


def random_rows(n: int, n_vocab: int, noise: float, spread: float = 3.0) -> tuple[F32Array, F32Array, npt.NDArray]:
    random = np.random.default_rng(n_vocab)
    reference = (random.standard_normal((n, n_vocab)) * spread).astype(np.float32)
    model = (reference + random.standard_normal((n, n_vocab)) * noise).astype(np.float32)
    return model, reference, random.integers(0, n_vocab, n).astype(np.int32)


@pytest.mark.parametrize("n_vocab", [2, 17, 4096, 50_001])
@pytest.mark.parametrize("spread", [0.0, 3.0, 300.0])
def test_scores_equal_the_definition(n_vocab: int, spread: float) -> None:
    model, reference, tokens = random_rows(12, n_vocab, 0.3, spread)
    scored = score_rows(model, reference, tokens)
    ours, theirs, index = log_softmax(model), log_softmax(reference), np.arange(12)
    np.testing.assert_allclose(scored["kld_nats"], (np.exp(theirs) * (theirs - ours)).sum(axis=1), atol=1e-11)
    np.testing.assert_allclose(scored["nll_model_nats"], -ours[index, tokens], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(scored["nll_reference_nats"], -theirs[index, tokens], rtol=1e-11, atol=1e-11)
    assert (scored["is_same_top"] == (model.argmax(axis=1) == reference.argmax(axis=1))).all()
    # shares are kept as f32 on the way
    np.testing.assert_allclose(scored["variation"], np.abs(np.exp(ours) - np.exp(theirs)).sum(axis=1) / 2, atol=1e-7)
    np.testing.assert_allclose(scored["top_reference"], np.exp(theirs.max(axis=1)), rtol=1e-11)
    best = model[index, reference.argmax(axis=1)]
    assert (scored["n_above_top"] == (model > best[:, None]).sum(axis=1)).all()
    assert scored["is_finite_model"].all()
    assert scored["is_finite_reference"].all()


def test_divergence_of_nearly_equal_rows_is_not_noise() -> None:
    _, reference, tokens = random_rows(64, 30_000, 0.0)
    same = score_rows(reference, reference, tokens)
    assert (same["kld_nats"] == 0).all()
    assert (same["variation"] == 0).all()
    assert (same["n_above_top"] == 0).all()
    shifted = reference + np.float32(2.0)  # the same distribution but for the rounding of f32
    assert np.abs(score_rows(shifted, reference, tokens)["kld_nats"]).max() < 1e-11
    model = np.nextafter(reference, np.float32(np.inf))
    assert score_rows(model, reference, tokens)["kld_nats"].min() > -1e-12


def test_extreme_logits_stay_finite() -> None:
    top = np.finfo(np.float32).max
    reference = np.array([[top, -top, 0], [1e4, 0, -1e4]], dtype=np.float32)
    scored = score_rows(reference[:, ::-1].copy(), reference, np.array([0, 2], dtype=np.int32))
    assert np.isfinite(scored["kld_nats"]).all()
    assert scored["kld_nats"][1] == pytest.approx(2e4)


def test_equal_tops_take_the_first() -> None:
    reference = np.array([[1, 2, 2, 0]], dtype=np.float32)
    model = np.array([[1, 2, 2.5, 0]], dtype=np.float32)
    zero = np.zeros(1, dtype=np.int32)
    assert score_rows(reference, reference, zero)["is_same_top"].all()
    assert not score_rows(model, reference, zero)["is_same_top"].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_rows_are_marked_and_only_those(bad: float) -> None:
    model, reference, tokens = random_rows(5, 1000, 0.1)
    whole = score_rows(model, reference, tokens)
    model[1, 999] = bad
    reference[3, 0] = bad
    scored = score_rows(model, reference, tokens)
    assert scored["is_finite_model"].tolist() == [True, False, True, True, True]
    assert scored["is_finite_reference"].tolist() == [True, True, True, False, True]
    assert (scored[[0, 2, 4]] == whole[[0, 2, 4]]).all()
    assert (scored["kld_nats"][[1, 3]] == 0).all()


def test_threads_change_nothing() -> None:
    model, reference, tokens = random_rows(37, 777, 0.2)
    with ThreadPoolExecutor(3) as workers:
        threaded = score_rows(model, reference, tokens, workers=workers, n_workers=3)
    assert threaded.tobytes() == score_rows(model, reference, tokens).tobytes()


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    model, reference, _ = random_rows(2, 10, 0.1)
    with pytest.raises(ValueError, match="outside the vocabulary of 10"):
        score_rows(model, reference, np.array([3, 10], dtype=np.int32))
    with pytest.raises(ValueError, match="shapes differ"):
        score_rows(model, reference[:, :9].copy(), np.array([3, 1], dtype=np.int32))


@pytest.mark.parametrize(("n", "first", "batch", "rows"), [(511, 256, 512, 64), (7, 4, 8, 1), (40, 0, 16, 64)])
def test_windows_are_cut_within_both_limits(n: int, first: int, batch: int, rows: int) -> None:
    bounds = list(batch_bounds(n, first, batch, rows))
    assert [position for start, stop in bounds for position in range(start, stop)] == list(range(n))
    for start, stop in bounds:
        assert stop - start <= batch
        assert stop - max(start, first) <= rows


def test_rows_at_a_time_fit_64_megabytes() -> None:
    assert default_rows(248_320) == 64
    assert default_rows(4096) == 4096


def test_bootstrap_of_independent_draws_agrees_with_theory() -> None:
    values = np.random.default_rng(1).exponential(size=(400, 25))
    window, place = np.divmod(np.arange(values.size), 25)
    draws = bootstrap.resample(window, place, 25, seed=3)
    assert (draws.unit, draws.n_cluster) == ("window", 400)
    theory = values.std() / np.sqrt(values.size)
    assert bootstrap.standard_error(bootstrap.resampled_means(values.ravel(), draws)) == pytest.approx(theory, rel=0.1)
    # of a median: 1 / (2 f(m) sqrt(n)), with density f(m) = 1/2 here
    medians = bootstrap.resampled_quantiles(values.ravel(), (0.5,), draws)
    assert bootstrap.standard_error(medians[:, 0]) == pytest.approx(1 / np.sqrt(values.size), rel=0.15)


def test_bootstrap_sees_that_a_window_is_one_draw() -> None:
    values = np.repeat(np.random.default_rng(2).standard_normal(100), 50)
    window, place = np.divmod(np.arange(values.size), 50)
    means = bootstrap.resampled_means(values, bootstrap.resample(window, place, 50, seed=0))
    assert bootstrap.standard_error(means) == pytest.approx(values.std() / 10, rel=0.1)


def test_resampled_quantiles_are_those_of_the_resample() -> None:
    random = np.random.default_rng(5)
    values = random.standard_normal(60)
    window, place = np.divmod(np.arange(60), 2)
    draws = bootstrap.resample(window, place, 2, seed=1)
    got = bootstrap.resampled_quantiles(values, (0.5, 0.99), draws)
    for i in (0, 7, 999):
        drawn = np.repeat(values, draws.counts[i][draws.cluster])
        np.testing.assert_allclose(got[i], np.quantile(drawn, [0.5, 0.99]), rtol=1e-12)


def test_few_windows_are_cut_into_blocks() -> None:
    window, place = np.divmod(np.arange(2 * 255), 255)
    draws = bootstrap.resample(window, place, 255, seed=0)
    assert (draws.unit, draws.n_cluster) == ("block", 20)
    assert np.bincount(draws.cluster).min() >= 25
    assert bootstrap.resample(np.array([0]), np.array([2]), 3, seed=0).n_cluster == 1


@dataclass
class LetterRuntime:
    """One token a byte; logits from a fixed table, given in groups of `rows`."""

    table: F32Array
    rows: int = 5
    n_ctx: int = 1 << 20
    bos: int | None = None
    vocabulary: str = "letters"
    versions: Mapping[str, str] = field(default_factory=lambda: {"table": "1"})

    @property
    def n_vocab(self) -> int:
        return self.table.shape[1]

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode())

    def token_bytes(self, tokens: Sequence[int]) -> list[int]:
        return [1 + token % 3 for token in tokens]

    def twin(self, *, threads: int) -> AbstractContextManager[LetterRuntime]:
        return nullcontext(replace(self))

    def logits(self, tokens: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, F32Array]]:
        buffer = np.empty((self.rows, self.n_vocab), dtype=np.float32)
        for start, stop in batch_bounds(len(tokens), first, 16, self.rows):
            scored = max(start, first)
            if scored < stop:
                buffer[: stop - scored] = self.table[list(tokens[scored:stop])]
                yield scored, buffer[: stop - scored]


@pytest.fixture
def table() -> F32Array:
    return np.random.default_rng(9).standard_normal((128, 128)).astype(np.float32)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "letters.txt"
    path.write_bytes(bytes(np.random.default_rng(4).integers(32, 127, 500, dtype=np.uint8)) + b"\n")
    return path


@pytest.mark.parametrize("context", [8, 9, 64])
@pytest.mark.parametrize("n_threads", [1, 4])
def test_the_second_half_of_each_window_is_scored(table: F32Array, text: Path, context: int, n_threads: int) -> None:
    model = table + np.float32(0.1) * table[::-1]
    corpus = cut_corpus(text, LetterRuntime(table), context=context)
    assert corpus.windows.shape == (500 // context, context)
    steps: list[tuple[int, int]] = []
    scored = score_windows(
        LetterRuntime(model),
        LetterRuntime(table),
        corpus,
        n_threads=n_threads,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(i + 1, 500 // context) for i in range(500 // context)]
    tokens = list(text.read_bytes()[:-1])
    expected = [
        score_rows(model[[tokens[i]]], table[[tokens[i]]], np.array([tokens[i + 1]], dtype=np.int32))
        for window in range(500 // context)
        for i in range(window * context + context // 2, window * context + context - 1)
    ]
    assert scored.ravel().tolist() == np.concatenate(expected).tolist()


def test_bos_leads_the_text_and_every_window(table: F32Array, text: Path) -> None:
    corpus = cut_corpus(text, LetterRuntime(table, bos=1), context=50)
    assert corpus.text_tokens == 501
    assert corpus.windows[:, 0].tolist() == [1] * 10
    assert corpus.windows[0, 1:].tolist() == list(text.read_bytes()[:49])
    assert corpus.windows[1, 1:].tolist() == list(text.read_bytes()[50:99])


def test_text_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("é\r\nb\n\n".encode())
    assert read_text(path) == "é\r\nb\n"
    path.write_bytes(b"ab\xff")
    with pytest.raises(EvalError, match="byte 2 is not UTF-8"):
        read_text(path)
    with pytest.raises(EvalError, match="cannot be read"):
        read_text(tmp_path)


def compare_tables(text: Path, model: LetterRuntime, reference: LetterRuntime, **options: int) -> Report:
    runs = {"model.gguf": model, "reference.gguf": reference}
    folder = text.parent
    for name, run in runs.items():
        (folder / name).write_bytes(run.table.tobytes())
    return compare(
        folder / "model.gguf",
        folder / "reference.gguf",
        text,
        opener=lambda path, **_: nullcontext(runs[Path(path).name]),
        **options,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 7}, "context 7 is too short"),
        ({"context": 501}, "500 tokens are too few for one window of 501"),
        ({"context": 16, "chunks": 0}, "0 chunks cannot be scored"),
    ],
)
def test_what_cannot_be_scored_is_refused(table: F32Array, text: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        compare_tables(text, LetterRuntime(table), LetterRuntime(table), **options)


def test_other_vocabularies_are_refused(table: F32Array, text: Path) -> None:
    reference = LetterRuntime(table)
    with pytest.raises(EvalError, match="has 127 tokens"):
        compare_tables(text, LetterRuntime(table[:, :127].copy()), reference)
    with pytest.raises(EvalError, match="different meanings"):
        compare_tables(text, LetterRuntime(table, vocabulary="other"), reference)
    with pytest.raises(EvalError, match=r"cut .*letters\.txt differently"):
        compare_tables(text, LetterRuntime(table, bos=1), reference, context=16)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_groups_of_unlike_sizes_give_the_same_numbers(table: F32Array, text: Path, n_threads: int) -> None:
    model, corpus = table + np.float32(0.1) * table[::-1], cut_corpus(text, LetterRuntime(table), context=64)
    alike = score_windows(LetterRuntime(model, rows=5), LetterRuntime(table, rows=5), corpus)
    for ours, theirs in ((3, 7), (16, 2), (1, 16)):
        found = score_windows(
            LetterRuntime(model, rows=ours), LetterRuntime(table, rows=theirs), corpus, n_threads=n_threads
        )
        assert found.tobytes() == alike.tobytes()


@pytest.mark.parametrize("context", [16, 125, 166])
def test_lanes_give_the_same_numbers_and_count_every_window(table: F32Array, text: Path, context: int) -> None:
    model, corpus = table + np.float32(0.1) * table[::-1], cut_corpus(text, LetterRuntime(table), context=context)
    steps: list[tuple[int, int]] = []
    found = score_windows(
        LetterRuntime(model),
        LetterRuntime(table),
        corpus,
        n_threads=2,
        twins=(LetterRuntime(model), LetterRuntime(table)),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert found.tobytes() == score_windows(LetterRuntime(model), LetterRuntime(table), corpus).tobytes()
    assert steps == [(i + 1, 500 // context) for i in range(500 // context)]


def test_what_stops_one_lane_stops_the_other(table: F32Array, text: Path) -> None:
    corpus = cut_corpus(text, LetterRuntime(table), context=8)
    done: list[int] = []

    def stop(count: int, _total: int) -> None:
        done.append(count)
        raise KeyboardInterrupt

    runs = LetterRuntime(table), LetterRuntime(table)
    with pytest.raises(KeyboardInterrupt):
        score_windows(*runs, corpus, n_threads=2, twins=(LetterRuntime(table), LetterRuntime(table)), progress=stop)
    assert len(done) <= 2 < len(corpus.windows)


def test_rows_for_other_positions_are_an_error(table: F32Array, text: Path) -> None:
    @dataclass
    class Late(LetterRuntime):
        def logits(self, tokens: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, F32Array]]:
            return super().logits(tokens, first=first + 1)

    with pytest.raises(ValueError, match="do not give rows for the same positions"):
        score_windows(LetterRuntime(table), Late(table), cut_corpus(text, LetterRuntime(table), context=64))


def test_positions_without_numbers_are_counted_apart(table: F32Array, text: Path) -> None:
    broken = table.copy()
    letter = text.read_bytes()[10]
    broken[letter, 3] = np.nan
    report = compare_tables(text, LetterRuntime(broken), LetterRuntime(table), context=16)
    scored = [i for i in range(496) if 8 <= i % 16 < 15]
    count = sum(text.read_bytes()[i] == letter for i in scored)
    assert count > 0
    assert (report.non_finite, report.non_finite_model, report.non_finite_reference) == (count, count, 0)
    assert report.tokens == len(scored)
    assert report.metrics.kld.max == 0
    assert f"Not finite at {count} positions" in to_markdown(report)
    broken[:] = np.inf
    with pytest.raises(EvalError, match="none of 217 positions has finite logits"):
        compare_tables(text, LetterRuntime(broken), LetterRuntime(table), context=16)


@dataclass(frozen=True)
class Array:
    """A tensor's rows from memory."""

    values: F32Array

    def rows(self, start: int, stop: int) -> F32Array:
        return np.atleast_2d(self.values)[start:stop]

    def stored(self, start: int, stop: int) -> None:
        return None


def model_of(**arrays: F32Array) -> Model:
    tensors = tuple(Tensor(name, Role.FFN_UP, 3, each.shape, "Q4_K", Array(each)) for name, each in arrays.items())
    return Model("qwen35", {}, tensors, {})


def test_weight_errors_equal_the_definition() -> None:
    random = np.random.default_rng(0)
    wide = random.standard_normal((3, CHUNK_WEIGHTS // 2 + 1)).astype(np.float32)  # one row a chunk
    noisy = (wide + 0.01 * random.standard_normal(wide.shape)).astype(np.float32)
    flat = random.standard_normal(7).astype(np.float32)
    first, second = weight_errors(model_of(wide=noisy, flat=flat), model_of(flat=flat, wide=wide))
    a, b = noisy.astype(np.float64).ravel(), wide.astype(np.float64).ravel()
    assert (first.name, first.role, first.layer, first.format) == ("wide", Role.FFN_UP, 3, "Q4_K")
    assert first.cosine == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), rel=1e-12)
    assert first.snr_db == pytest.approx(10 * np.log10((b @ b) / ((a - b) @ (a - b))), rel=1e-9)
    assert first.relative_rmse == pytest.approx(np.sqrt((a - b) @ (a - b) / (b @ b)), rel=1e-9)
    assert first.max_abs_error == np.abs(a - b).max()
    assert (second.cosine, second.snr_db, second.relative_rmse) == (pytest.approx(1), None, 0)


def test_weight_errors_of_zeros() -> None:
    zero, one = np.zeros(4, dtype=np.float32), np.ones(4, dtype=np.float32)
    lost, gained, same = weight_errors(model_of(a=zero, b=one, c=zero), model_of(a=one, b=zero, c=zero))
    assert (lost.cosine, lost.snr_db, lost.relative_rmse) == (0, 0, 1)
    assert (gained.cosine, gained.snr_db, gained.relative_rmse) == (0, -200, None)
    assert (same.cosine, same.snr_db, same.relative_rmse) == (1, None, 0)


def test_weight_errors_list_every_tensor_without_a_counterpart() -> None:
    one, two = np.ones((2, 4), dtype=np.float32), np.ones((4, 2), dtype=np.float32)
    with pytest.raises(EvalError, match="3 tensors") as caught:
        weight_errors(model_of(a=one, b=one), model_of(a=two, c=one))
    for line in ("b: only in the model", "c: only in the reference", "a: shape [2, 4], in the reference [4, 2]"):
        assert line in str(caught.value)
