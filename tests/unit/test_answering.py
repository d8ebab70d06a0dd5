"""What the benchmark harness is answered, with a model whose logits are known in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from pocketquant.errors import EvalError
from pocketquant.eval.tasks.answering import AnsweringModel
from pocketquant.formats import F32Array
from pocketquant.llama.shared_prefix import IsOver

N_VOCAB = 128


class Letters:
    """A token is an ASCII letter; after n tokens that add up to s, the logit of token t is sin(t + s) * (n + 1) / n."""

    n_vocab, n_ctx, bos, first, vocabulary = N_VOCAB, 24, None, 1, "letters"
    versions: Mapping[str, str] = {"letters": "1"}

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode("ascii"))

    def text(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode()

    def is_end(self, token: int) -> bool:
        return token == 0

    def row(self, tokens: Sequence[int]) -> F32Array:
        n = len(tokens)
        return (np.sin(np.arange(N_VOCAB) + sum(tokens)) * (n + 1) / n).astype(np.float32)

    def continuations(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]], *, keep: int = 0
    ) -> Iterator[tuple[int | None, int, F32Array]]:
        self.asked.append((self.text(prompt), len(continuations), keep))
        assert all(len(prompt) + len(each) <= self.n_ctx for each in continuations)
        yield None, 0, self.row(prompt)[None]
        for i, tokens in enumerate(continuations):
            for at in range(1, len(tokens)):
                yield i, at, self.row([*prompt, *tokens[:at]])[None]

    def write(self, prompt: Sequence[int], count: int, is_over: IsOver, *, keep: int = 0) -> list[int]:
        self.asked.append((self.text(prompt), count, keep))
        written: list[int] = []
        for letter in b"abcd. xyz":
            written.append(letter)
            if is_over(written) or len(written) == count:
                return written
        return [*written, 0]


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def expected(runtime: Letters, prompt: str, answer: str) -> float:
    tokens, total = runtime.tokenize(prompt), 0.0
    for token in runtime.tokenize(answer):
        row = runtime.row(tokens).astype(np.float64)
        total += row[token] - np.log(np.exp(row).sum())
        tokens.append(token)
    return total


def test_every_answer_gets_its_own_probability_and_each_question_is_asked_once() -> None:
    runtime = Letters()
    pairs = [("Q: b", " yes"), ("Q: a", " no"), ("Q: b", " no"), ("Q: a", " perhaps"), ("Q: b", "x")]
    results = AnsweringModel(runtime).loglikelihood([Request(*pair) for pair in pairs])
    assert [value for value, _ in results] == pytest.approx([expected(runtime, *pair) for pair in pairs], abs=1e-5)
    assert runtime.asked == [("Q: a", 2, 3), ("Q: b", 3, 0)]


def test_the_most_likely_answer_is_known_as_such() -> None:
    runtime = Letters()
    best = chr(int(runtime.row(runtime.tokenize("Q")).argmax()))
    other = "A" if best != "A" else "B"
    assert [
        greedy for _, greedy in AnsweringModel(runtime).loglikelihood([Request("Q", best), Request("Q", other)])
    ] == [
        True,
        False,
    ]


def test_spaces_at_the_end_of_a_question_belong_to_the_answer() -> None:
    runtime = Letters()
    with_space, without = AnsweringModel(runtime).loglikelihood([Request("Q: ", "b"), Request("Q:", " b")])
    assert with_space == without
    assert runtime.asked == [("Q:", 2, 0)]


def test_questions_too_long_lose_their_beginning_and_are_counted() -> None:
    runtime, question = Letters(), "a question of thirty letters.."
    model = AnsweringModel(runtime)
    ((value, _),) = model.loglikelihood([Request(question, " no")])
    assert value == pytest.approx(expected(runtime, question[-21:], " no"), abs=1e-5)
    assert model.cost.cut_prompts == 1
    with pytest.raises(EvalError, match="continuation of 30 tokens cannot be scored in a window of 24"):
        model.loglikelihood([Request("Q", question)])


def test_texts_of_any_length_have_each_token_predicted_once() -> None:
    runtime, text = Letters(), "abcdefghijklmnopqrstuvwxyz" * 2
    (value,) = AnsweringModel(runtime).loglikelihood_rolling([Request(text)])
    whole = "\x01" + text
    # windows of 24 tokens predict 23; the last one has as much before it as fits
    windows = [whole[0:1], whole[1:24], whole[23:24], whole[24:47], whole[29:47], whole[47:53]]
    parts = [expected(runtime, windows[i], windows[i + 1]) for i in (0, 2, 4)]
    assert sum(len(windows[i]) for i in (1, 3, 5)) == len(text)
    assert value == pytest.approx(sum(parts), abs=1e-4)


def test_answers_are_written_up_to_what_ends_them() -> None:
    model = AnsweringModel(Letters())
    requests = [
        Request("Q", {"until": ["."]}),
        Request("Q", {"until": "cd", "max_gen_toks": 9}),
        Request("Q", {"max_gen_toks": 3}),
        Request("Q", {}),
        Request("Q", {"until": ["."]}),
    ]
    assert model.generate_until(requests) == ["abcd", "ab", "abc", "abcd. xyz", "abcd"]
    assert model.cost.requests == 5


def test_sampling_and_cut_answers_are_recorded() -> None:
    model = AnsweringModel(Letters())
    model.generate_until([Request("a question here", {"max_gen_toks": 500, "do_sample": True, "temperature": 0.6})])
    assert (model.cost.sampled, model.cost.cut_answers, model.cost.cut_prompts) == (1, 1, 1)


def test_logits_that_are_no_numbers_make_an_answer_impossible() -> None:
    class Broken(Letters):
        def row(self, tokens: Sequence[int]) -> F32Array:
            row = super().row(tokens)
            row[5] = np.nan if len(tokens) > 2 else row[5]
            return row

    model = AnsweringModel(Broken())
    results = model.loglikelihood([Request("Q", "a"), Request("Q", "abc")])
    assert np.isfinite(results[0][0])
    assert results[1] == (float("-inf"), False)
    assert model.cost.non_finite == 1


def test_a_dry_run_counts_what_sharing_saves() -> None:
    runtime = Letters()
    model = AnsweringModel(runtime, is_dry=True)
    model.loglikelihood([Request("question", " a"), Request("question", " bc"), Request("another", " d")])
    assert runtime.asked == []
    assert (model.cost.asked_tokens, model.cost.decoded_tokens) == (9 + 10 + 8, 8 + 1 + 2 + 7 + 1)


def test_the_harness_finds_every_method_that_it_asks_for() -> None:
    api = pytest.importorskip("lm_eval.api.model", reason="lm-evaluation-harness is not installed")
    wanted = api.LM.__abstractmethods__ | {
        "apply_chat_template",
        "chat_template",
        "tokenizer_name",
        "rank",
        "world_size",
    }
    assert all(hasattr(AnsweringModel, name) for name in wanted)
