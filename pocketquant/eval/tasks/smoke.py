"""A smoke test: whether a model still answers a few chats sensibly. The faults of its answers are counted.

A broken quantization often keeps its benchmark scores and fails here: it repeats itself, never ends its thinking, or
writes in another script. Small models do some of that at full precision. So each fault is counted against those of the
reference, prompt by prompt, with the exact test of `paired`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketquant.errors import EvalError
from pocketquant.eval.kinship import describe_quantized
from pocketquant.eval.tasks.answering import write_answer
from pocketquant.eval.tasks.compare import Progress, chat_renderer, context_of
from pocketquant.eval.tasks.paired import Paired, pair_answers
from pocketquant.extras import list_versions
from pocketquant.files.reading import states_of
from pocketquant.files.unchanged import check_unchanged
from pocketquant.gguf_file.identity import FileIdentity, identify_model
from pocketquant.llama.library import check_loadable
from pocketquant.llama.shared_prefix import SharedPrefixRuntime, open_shared_prefix

SCHEMA = "pocketquant.smoke/1"
MAX_TOKENS = 256
FAULTS = ("loop", "unclosed_thinking", "invalid_json", "wrong_script", "empty")
_REPEATS, _LOOP_WORDS, _LOOP_CHARACTERS = 4, 24, 60
_WRONG_SHARE = 0.2


@dataclass(frozen=True)
class Prompt:
    """What is asked, the scripts that an answer may be in (Latin always), and whether it must be JSON."""

    text: str
    scripts: tuple[str, ...] = ()
    is_json: bool = False


PROMPTS = (
    Prompt("What is a quokka?"),
    Prompt("Explain in two sentences why the sky is blue."),
    Prompt("Write a short story about a lighthouse keeper."),
    Prompt("List ten animals, one a line."),
    Prompt("What is 17 times 23? Think step by step."),
    Prompt("A train leaves at 9:40 and arrives at 13:05. How long does it take?"),
    Prompt("Write a Python function that reverses a linked list."),
    Prompt("Write an SQL query that counts the orders of each customer."),
    Prompt("Define the word 'serendipity'."),
    Prompt("How long is the coastline of Iceland?"),
    Prompt("Name the planets of the solar system in order."),
    Prompt("Give me a recipe for pancakes."),
    Prompt("Summarize the plot of Hamlet."),
    Prompt("Write a polite email that declines an invitation."),
    Prompt("Answer with one JSON object and nothing else: name and age of a person called Ada, 36.", is_json=True),
    Prompt("Answer with a JSON array of the first five prime numbers and nothing else.", is_json=True),
    Prompt("Answer with JSON only: the keys 'city' and 'country' for Paris.", is_json=True),
    Prompt(
        "Answer with JSON only: a list of two objects with the keys 'x' and 'y', numbers of your choice.", is_json=True
    ),
    Prompt("Warum ist der Himmel blau? Antworte in zwei Sätzen."),
    Prompt("¿Cuál es la capital de Australia y por qué no es Sídney?"),
    Prompt("Traduis en français : The book is on the table."),
    Prompt("请用两句话解释为什么天空是蓝色的。", ("CJK",)),
    Prompt("日本の首都はどこですか。", ("CJK", "HIRAGANA", "KATAKANA")),
    Prompt("Почему небо голубое?", ("CYRILLIC",)),
)


@dataclass(frozen=True)
class Answer:
    """The text that a model wrote, whether it ended by itself, and its faults: names of `FAULTS`."""

    text: str
    has_ended: bool
    faults: tuple[str, ...]


@dataclass(frozen=True)
class SmokeReport:
    """Faults of a model and of its reference on the same prompts.

    Attributes:
        faults: name -> on how many prompts, paired: `model` and `reference` are shares of prompts with the fault,
            `gained` those where only the model has it.
        answers: prompt, the model's answer, the reference's.
        reference_quantized: the types that the reference's own matrices are rounded to; None for full precision.
    """

    model: FileIdentity
    reference: FileIdentity
    max_tokens: int
    threads: int | None
    gpu_layers: int
    versions: Mapping[str, str]
    faults: Mapping[str, Paired]
    answers: tuple[tuple[Prompt, Answer, Answer], ...]
    reference_quantized: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {"schema": SCHEMA, **asdict(self)}


def compare_smoke(
    model: Path,
    reference: Path,
    *,
    prompts: Sequence[Prompt] = PROMPTS,
    max_tokens: int = MAX_TOKENS,
    threads: int | None = None,
    gpu_layers: int = 0,
    progress: Progress | None = None,
) -> SmokeReport:
    """Has both files answer the prompts, each in its own chat template, always with the most likely token.

    Raises:
        EvalError: a file has no chat template, or cannot be run.
        SourceError: a file was changed meanwhile.
    """
    files = states_of(model, reference)
    identities = identify_model(model), identify_model(reference)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, 2 * len(prompts))

    answers = []
    versions: Mapping[str, str] = {}
    for path in (model, reference):  # both before the first one has answered everything
        check_loadable(path)
    renders = [(path, chat_renderer(path)) for path in (model, reference)]
    for path, render in renders:
        texts = [render([{"role": "user", "content": prompt.text}], True) for prompt in prompts]
        with open_shared_prefix(path, context=context_of(path), threads=threads, gpu_layers=gpu_layers) as runtime:
            versions = runtime.versions
            written = []
            for prompt, text in zip(prompts, texts, strict=True):
                written.append(_answer(runtime, path, prompt, text, max_tokens))
                advance()
            answers.append(written)
    check_unchanged(files)
    ours, theirs = answers
    return SmokeReport(
        model=identities[0],
        reference=identities[1],
        max_tokens=max_tokens,
        threads=threads,
        gpu_layers=gpu_layers,
        versions=list_versions() | dict(versions),
        faults={
            fault: pair_answers([fault in each.faults for each in ours], [fault in each.faults for each in theirs])
            for fault in FAULTS
        },
        answers=tuple(zip(prompts, ours, theirs, strict=True)),
        reference_quantized=describe_quantized(reference) or None,
    )


def _answer(runtime: SharedPrefixRuntime, path: Path, prompt: Prompt, rendered: str, max_tokens: int) -> Answer:
    """The answer to one prompt, which the chat template has `rendered`."""
    tokens = ([] if runtime.bos is None else [runtime.bos]) + runtime.tokenize(rendered, special=True)
    room = runtime.n_ctx - len(tokens)
    if room <= 0:
        raise EvalError(f"{path}: {len(tokens)} tokens of {prompt.text!r} do not fit its {runtime.n_ctx}")
    text, has_ended = write_answer(runtime, tokens, min(max_tokens, room))
    return Answer(text, has_ended, find_faults(prompt, rendered, text, has_ended=has_ended))


def find_faults(prompt: Prompt, rendered: str, answer: str, *, has_ended: bool) -> tuple[str, ...]:
    """The faults of an answer.

    Args:
        prompt: what was asked.
        rendered: the prompt as the model saw it; a template may open the thinking itself.
        answer: what it wrote.
        has_ended: an answer cut at its limit is no fault by itself, but its thinking then never ended.
    """
    said = strip_thinking(rendered, answer)
    is_thinking = _is_thinking(rendered, answer)
    checks: Mapping[str, Callable[[], bool]] = {
        "loop": lambda: has_loop(answer),
        "unclosed_thinking": lambda: is_thinking,
        "invalid_json": lambda: prompt.is_json and not is_thinking and not is_json(said),
        "wrong_script": lambda: wrong_script_share(answer, prompt.scripts) > _WRONG_SHARE,
        "empty": lambda: has_ended and not is_thinking and not said.strip(),
    }
    return tuple(name for name in FAULTS if checks[name]())


def has_loop(text: str) -> bool:
    """Whether it ends by repeating itself: the same words at least four times in a row, 24 words or 60 characters.

    Characters are looked at too, because some scripts have no blanks between words.
    """
    return _repeats_at_end(text.split(), _LOOP_WORDS) or _repeats_at_end(list(text.strip()), _LOOP_CHARACTERS)


def _repeats_at_end(items: Sequence[str], least: int) -> bool:
    for period in range(1, len(items) // _REPEATS + 1):
        times = max(_REPEATS, -(-least // period))
        span = period * (times - 1)
        # the last repetition may be cut off anywhere, so each item is compared with the one a period before it
        if len(items) >= span + period and items[-span:] == items[-span - period : -period]:
            return True
    return False


def is_json(text: str) -> bool:
    """Whether it is JSON, in a fenced block or bare."""
    fenced = re.search(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    try:
        json.loads((fenced.group(1) if fenced else text).strip())
    except (ValueError, RecursionError):
        return False
    return True


def wrong_script_share(text: str, scripts: Sequence[str]) -> float:
    """Share of the letters that are neither Latin nor in one of the scripts, by their Unicode names; 0 without any."""
    letters = [unicodedata.name(letter, "UNKNOWN").split(" ")[0] for letter in text if letter.isalpha()]
    wrong = sum(name not in ("LATIN", "MICRO", "FEMININE", "MASCULINE", "GREEK", *scripts) for name in letters)
    broken = text.count("\ufffd")  # bytes that are no UTF-8
    return (wrong + broken) / max(len(letters) + broken, 1)


def strip_thinking(rendered: str, answer: str) -> str:
    """An answer without its thoughts, finished or not."""
    return re.sub(r"<think>.*?(</think>|$)", "", _with_opening(rendered, answer), flags=re.DOTALL)


def _is_thinking(rendered: str, answer: str) -> bool:
    text = _with_opening(rendered, answer)
    return text.rfind("<think>") > text.rfind("</think>")


def _with_opening(rendered: str, answer: str) -> str:
    opens = rendered.rfind("<think>") > rendered.rfind("</think>")
    return "<think>" + answer if opens else answer
