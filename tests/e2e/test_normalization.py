"""Texts get the tokens that the model's own tokenizer gives them, composed or not."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pocketquant.demo import checkpoint_dir
from pocketquant.errors import EvalError
from pocketquant.eval import compare
from pocketquant.llama.normalization import normalized_between
from pocketquant.llama.runtime import TextRuntime, open_runtime

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
TOKENIZER = Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))
TEXTS = [
    "Zoë mußte nach Ålesund",
    "Tiếng Việt có sáu thanh điệu",
    "한국어 문장",
    "ガギグゲゴ パピプペポ",
    "ἀρχὴ ἥμισυ παντός",
    "קָמָץ שָׁלוֹם",
    "Å Ω K",  # Angstrom, Ohm and Kelvin signs, which NFC replaces
]


@pytest.fixture(scope="module")
def runtime(demo_gguf: Callable[[str], Path]) -> Iterator[TextRuntime]:
    with open_runtime(demo_gguf("q8_0"), context=64) as run:
        yield run


@pytest.mark.parametrize("text", [unicodedata.normalize(form, text) for text in TEXTS for form in ("NFD", "NFC")])
def test_the_tokens_are_the_tokenizers_own(text: str, runtime: TextRuntime) -> None:
    assert runtime.tokenize(text) == TOKENIZER.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(
        alphabet=st.sampled_from("ae oAE\n.1" + "\u0300\u0301\u0308\u030a\u0323\u0327\u1100\u1161\u11a8\u212b\ufb1d")
    )
)
def test_any_pile_of_marks_has_the_same_tokens(text: str, runtime: TextRuntime) -> None:
    assert runtime.tokenize(text) == TOKENIZER.encode(text).ids


def test_a_mark_behind_a_special_token_stays_outside_it(runtime: TextRuntime) -> None:
    text = "<|im_start|>\u0338user\ne\u0301<|im_end|>"
    assert runtime.tokenize(text, special=True) == TOKENIZER.encode(text).ids


def test_names_are_left_alone() -> None:
    assert normalized_between("a\u030a<x>\u0338", ["<x>"]) == "\u00e5<x>\u0338"
    assert normalized_between("e\u0301", []) == "\u00e9"


def test_like_llama_perplexity_takes_no_text_that_it_would_read_otherwise(
    demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("cafe\u0301 " * 200)
    file = demo_gguf("q8_0")
    with pytest.raises(EvalError, match="not in Unicode's NFC"):
        compare(file, file, tmp_path / "text.txt", context=64, like="llama-perplexity")
