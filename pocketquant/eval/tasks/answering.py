"""A GGUF as the model of lm-evaluation-harness: it scores continuations of prompts and writes answers.

The harness asks a model for `loglikelihood`, `loglikelihood_rolling` and `generate_until`, and needs `rank` and
`world_size`; any object that has these will do. Its requests hold every answer of a question as a pair of its own. Here
a question is decoded once for all its answers, and the prefix that it shares with the next question (the examples of a
few-shot task) is kept.

Source: lm-evaluation-harness 0.4.13, lm_eval/api/model.py (what the methods take and give, how a pair is cut into
tokens).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.formats import F32Array
from pocketquant.llama.shared_prefix import CHUNK, SharedPrefixRuntime

DEFAULT_TOKENS = 256
"""Tokens that an answer may have where the task does not say; the harness's own default."""

Advance = Callable[[int], None]
_Job = tuple[tuple[int, ...], int, tuple[str, ...]]  # prompt, most tokens, what ends it

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""Messages, and whether an answer is to follow -> the text of a prompt."""


@dataclass
class Cost:
    """The requests made to a model, and the tokens decoded for them.

    Attributes:
        requests: pairs of prompt and continuation, or prompts to write on from.
        asked_tokens: tokens if every request were decoded from its beginning; what it may write included.
        decoded_tokens: tokens with each shared prefix decoded once.
        cut_prompts: prompts that lost their beginning because they did not fit.
        cut_answers: answers that had to end before the length that their task allows.
        sampled: requests that asked for a drawn answer and got the most likely one.
        non_finite: rows of logits that were not finite; such a continuation counts as impossible.
    """

    requests: int = 0
    asked_tokens: int = 0
    decoded_tokens: int = 0
    cut_prompts: int = 0
    cut_answers: int = 0
    sampled: int = 0
    non_finite: int = 0


class AnsweringModel:
    """The methods that the harness calls.

    Args:
        runtime: the model.
        render: its chat template; None if there is none.
        advance: told how many requests are done.
        is_dry: count tokens and answer nothing.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        runtime: SharedPrefixRuntime,
        *,
        render: Render | None = None,
        advance: Advance = lambda count: None,
        is_dry: bool = False,
    ) -> None:
        self.cost = Cost()
        self._runtime, self._render, self._advance, self._is_dry = runtime, render, advance, is_dry
        self._start = [] if runtime.bos is None else [runtime.bos]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(sum of ln p of the continuation's tokens, whether each is the most likely) per (context, continuation)."""
        pairs = [self._cut(*self._tokens_of_pair(*request.args)) for request in requests]
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Sum of ln p of all tokens of (text,), in windows as long as the context allows."""
        sums = []
        for request in requests:
            pairs = self._windows(self._runtime.tokenize(request.args[0], special=True))
            sums.append(sum(value for value, _ in self._score(pairs, counts=1)))
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The most likely answer to (context, {"until": ..., "max_gen_toks": ...}), without what ends it."""
        jobs: list[_Job] = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else [stop for stop in until if stop]
            asked = int(options.get("max_gen_toks") or options.get("max_tokens") or DEFAULT_TOKENS)
            self.cost.sampled += bool(options.get("do_sample")) and float(options.get("temperature") or 1) > 0
            prompt = self._start + self._runtime.tokenize(context, special=True) or [self._runtime.first]
            fitting, count = self._fit(prompt, asked)
            jobs.append((tuple(fitting), count, tuple(until)))
        answers: dict[_Job, str] = {}
        order = sorted(set(jobs))
        held = 0
        for i, job in enumerate(order):
            keep = _common(job[0], order[i + 1][0]) if i + 1 < len(order) else 0
            held = self._count(job[0], order[i - 1][0] if i else (), held, keep)
            answers[job] = self._write(*job, keep)
            self._advance(1)
        self.cost.requests += len(jobs)
        self._advance(len(jobs) - len(order))
        return [answers[job] for job in jobs]

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's own template writes it."""
        if self._render is None:
            raise EvalError("the model has no chat template; leave out --chat, or convert it with --chat-template FILE")
        return self._render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """A name for the template; the harness stores it and does nothing with it."""
        return "the file's own" if self._render is not None else ""

    @property
    def tokenizer_name(self) -> str:
        return self._runtime.vocabulary

    # ---------------------------------------------------------------- tokens

    def _tokens_of_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Cuts text into tokens as a whole, then at the end of the context; spaces go with what follows."""
        tokenize = self._runtime.tokenize
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        if not context:
            tokens = tokenize(continuation, special=True)
            return [self._runtime.first], tokens
        prompt = tokenize(context, special=True)
        answer = tokenize(context + continuation, special=True)[len(prompt) :]
        return self._start + prompt, answer or tokenize(continuation, special=True)

    def _cut(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        room = self._runtime.n_ctx - len(answer)
        if not answer or room < 1:
            raise EvalError(
                f"a continuation of {len(answer)} tokens cannot be scored in a window of {self._runtime.n_ctx}; "
                + ("use a larger --context" if answer else "look for empty answers in the task")
            )
        self.cost.cut_prompts += len(prompt) > room
        return prompt[-room:], answer

    def _fit(self, prompt: list[int], asked: int) -> tuple[list[int], int]:
        """A prompt and the room for its answer: at least half the window, if it asks for so much."""
        n_ctx = self._runtime.n_ctx
        count = max(min(asked, n_ctx - len(prompt)), min(asked, n_ctx // 2))
        self.cost.cut_prompts += len(prompt) > n_ctx - count
        self.cost.cut_answers += count < asked
        return prompt[-(n_ctx - count) :], count

    def _windows(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        whole, n_ctx, pairs = [self._runtime.first, *tokens], self._runtime.n_ctx, []
        for start in range(1, len(whole), n_ctx - 1):
            stop = min(start + n_ctx - 1, len(whole))
            pairs.append((whole[max(0, stop - n_ctx) : start], whole[start:stop]))
        return pairs

    # ---------------------------------------------------------------- running

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], counts: int | None = None
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, pair in enumerate(pairs):
            groups[tuple(pair[0])].append(i)
        results = [(0.0, True)] * len(pairs)
        order = sorted(groups)
        held = 0
        for place, prompt in enumerate(order):
            chosen = groups[prompt]
            answers = [pairs[i][1] for i in chosen]
            keep = _common(prompt, order[place + 1]) if place + 1 < len(order) else 0
            self.cost.asked_tokens += sum(len(prompt) + len(answer) - 1 for answer in answers)
            held = self._count(prompt, order[place - 1] if place else (), held, keep)
            self.cost.decoded_tokens += sum(len(answer) - 1 for answer in answers)
            if not self._is_dry:
                for i, result in zip(chosen, self._score_answers(prompt, answers, keep), strict=True):
                    results[i] = result
            if counts is None:
                self._advance(len(chosen))
        self.cost.requests += len(pairs) if counts is None else counts
        if counts is not None:
            self._advance(counts)
        return results

    def _count(self, prompt: Sequence[int], before: Sequence[int], held: int, keep: int) -> int:
        """Adds the tokens of a prompt that are decoded anew; gives how many the next one finds kept."""
        if (before and _common(prompt, before) < held) or held >= len(prompt):
            held = 0
        self.cost.decoded_tokens += len(prompt) - held
        return max(held, min(keep, len(prompt) - 1) // CHUNK * CHUNK)

    def _score_answers(
        self, prompt: Sequence[int], answers: Sequence[Sequence[int]], keep: int
    ) -> list[tuple[float, bool]]:
        sums, is_greedy = [0.0] * len(answers), [True] * len(answers)
        for which, at, rows in self._runtime.continuations(prompt, answers, keep=keep):
            for i in range(len(answers)) if which is None else (which,):
                tokens = answers[i][at : at + len(rows)]
                value, is_first = self._log_probability(rows, tokens)
                sums[i] += value
                is_greedy[i] &= is_first
        return list(zip(sums, is_greedy, strict=True))

    def _log_probability(self, rows: F32Array, tokens: Sequence[int]) -> tuple[float, bool]:
        total, is_first = 0.0, True
        for row, token in zip(rows, tokens, strict=True):  # one row at a time: it may be a megabyte
            largest = row.max()
            if not np.isfinite(largest) or not np.isfinite(row).all():
                self.cost.non_finite += 1
                return float("-inf"), False
            normalizer = float(np.log(np.exp(row - largest).sum(dtype=np.float64)))
            total += float(row[token]) - float(largest) - normalizer
            is_first &= int(row.argmax()) == token
        return total, is_first

    def _write(self, prompt: Sequence[int], count: int, until: Sequence[str], keep: int) -> str:
        self.cost.asked_tokens += len(prompt) + count
        self.cost.decoded_tokens += count
        if self._is_dry:
            return ""
        return write_answer(self._runtime, prompt, count, until, keep=keep)[0]


def write_answer(
    runtime: SharedPrefixRuntime, prompt: Sequence[int], count: int, until: Sequence[str] = (), *, keep: int = 0
) -> tuple[str, bool]:
    """The most likely answer, without what ends it, and whether it ended by itself."""
    reach = max([32, *(len(stop.encode()) + 4 for stop in until)])  # a token is a byte at least

    def is_over(written: Sequence[int]) -> bool:
        tail = runtime.text(written[-reach:]) if until else ""
        return any(stop in tail for stop in until)

    written = runtime.write(prompt, count, is_over, keep=keep)
    ended = bool(written) and runtime.is_end(written[-1])
    text = runtime.text(written[:-1] if ended else written)
    stops = [text.index(stop) for stop in until if stop in text]
    return (text[: min(stops)], True) if stops else (text, ended)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    length = min(len(one), len(other))
    differing = (i for i in range(length) if one[i] != other[i])
    return next(differing, length)
