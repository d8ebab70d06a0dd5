"""Answers that share a question: the same probabilities as without sharing, on every kind of kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from pocketquant.errors import EvalError
from pocketquant.llama.runtime import open_runtime
from pocketquant.llama.shared_prefix import SharedPrefixRuntime, open_shared_prefix

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
SAME = 1e-4


def log_probabilities(rows: np.ndarray) -> np.ndarray:
    logits = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def run(
    runtime: SharedPrefixRuntime, prompt: Sequence[int], answers: Sequence[Sequence[int]], keep: int = 0
) -> list[np.ndarray]:
    """ln p f64[n, n_vocab] at every token of every answer."""
    found: list[list[np.ndarray]] = [[] for _ in answers]
    for which, at, rows in runtime.continuations(prompt, answers, keep=keep):
        for i in range(len(answers)) if which is None else (which,):
            assert at == sum(map(len, found[i]))
            found[i].append(log_probabilities(rows))
    assert [sum(map(len, each)) for each in found] == [len(answer) for answer in answers]
    return [np.concatenate(each) for each in found]


def largest(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("recipe", ["f32", "q4_0", "pocket_4bit"])
def test_shared_beginnings_change_nothing(recipe: str, demo_gguf: Callable[[str], Path], demo_text: Path) -> None:
    text = demo_text.read_text(encoding="utf-8")[:6000]
    with open_shared_prefix(demo_gguf(recipe), context=300, threads=1) as runtime:
        tokens = runtime.tokenize(text, special=True)
        prompt = tokens[:150]
        # of all lengths, two alike, one longer than a chunk of 64
        answers = [tokens[150:158], tokens[400:401], tokens[500:503], tokens[700:790], tokens[150:158], tokens[30:36]]
        shared = run(runtime, prompt, answers)
        alone = [run(runtime, prompt, [answer])[0] for answer in answers]
        assert largest(shared, alone) == 0
        assert np.array_equal(shared[0], shared[4])
        assert np.abs(shared[0][1] - shared[2][1]).max() > 0.1  # no answer sees another
        # a prompt is as good as one with its last tokens in an answer; quantized activations are rounded otherwise then
        if recipe == "f32":
            whole = run(runtime, prompt[:100], [[*prompt[100:], *answers[3]]])[0]
            assert np.abs(whole[50:] - shared[3]).max() < SAME
        # what is kept for the next prompt, used, extended, and thrown away
        other = [*prompt[:130], *tokens[600:620]]
        for asked, keep in ((prompt, 130), (other, 64), (prompt, 0), (tokens[600:700], 64), (prompt, 149)):
            got = run(runtime, asked, answers[:3], keep=keep)
            if asked is prompt:
                assert largest(got, alone[:3]) < SAME


def test_the_numbers_are_those_of_the_other_runtime(demo_gguf: Callable[[str], Path], demo_text: Path) -> None:
    """That one has flash attention, whose sums depend on the batch: 0.003 nats in F32 at the worst token."""
    with (
        open_shared_prefix(demo_gguf("f32"), context=256, threads=1) as runtime,
        open_runtime(demo_gguf("f32"), context=256, threads=1) as plain,
    ):
        tokens = runtime.tokenize(demo_text.read_text(encoding="utf-8")[:1500], special=True)[:200]
        rows = np.concatenate([rows.copy() for _, rows in plain.logits(tokens[:-1], first=99)])
        (found,) = run(runtime, tokens[:100], [tokens[100:]])
        assert np.abs(found - log_probabilities(rows)).max() < 0.02


def test_text_is_written_greedily_until_it_is_over(demo_gguf: Callable[[str], Path], demo_text: Path) -> None:
    with open_shared_prefix(demo_gguf("f32"), context=256, threads=1) as runtime:
        prompt = runtime.tokenize(demo_text.read_text(encoding="utf-8")[:500], special=True)[:90]
        written = runtime.write(prompt, 12, lambda written: False)
        assert len(written) == 12
        (rows,) = run(runtime, prompt, [written])
        assert rows.argmax(axis=1).tolist() == written
        assert runtime.write(prompt, 12, lambda written: len(written) == 5, keep=64) == written[:5]
        assert runtime.write(prompt, 3, lambda written: False) == written[:3]
        question = "<|im_start|>user\nHow long is the coastline of Iceland?<|im_end|>\n<|im_start|>assistant\n<think>\n"
        chat = runtime.tokenize(question, special=True)
        answer = runtime.write(chat, 60, lambda written: False)
        assert runtime.is_end(answer[-1])
        assert not any(map(runtime.is_end, answer[:-1]))
        assert "</think>" in runtime.text(answer)


def test_what_does_not_fit_is_refused(demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    with open_shared_prefix(demo_gguf("f32"), context=64, threads=1) as runtime:
        for prompt, answers in (([5] * 60, [[6] * 5]), ([], [[6]]), ([5], [[6], []]), ([5], [])):
            with pytest.raises(ValueError, match="do not fit a window of 64"):
                list(runtime.continuations(prompt, answers))
        with pytest.raises(ValueError, match="do not fit"):
            runtime.write([5] * 60, 5, lambda written: False)
        assert len(run(runtime, [5] * 60, [[6] * 4, [7] * 4, [8] * 4, [9] * 4, [10] * 4])) == 5  # each fits by itself
    with pytest.raises(EvalError, match="no such file"):
        open_shared_prefix(tmp_path / "absent.gguf", context=64)
