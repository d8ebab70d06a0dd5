"""Tokenizers: the list as the tokenizers library numbers it, and a refusal for everything the runtimes would not do."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_maker import make_checkpoint, text_config, tokenizer_json
from tokenizers import Tokenizer

from pocketquant.architectures.hybrid import PRE_TOKENIZERS
from pocketquant.convert.tokenizer import _is_numbered_as_listed, read_tokenizer
from pocketquant.errors import TokenizerError

Change = Callable[[dict[str, Any]], None]


def folder_with(tmp_path: Path, change: Change, name: str = "tokenizer.json") -> Path:
    folder = make_checkpoint(tmp_path / "c", weights={})
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def read(folder: Path, n_vocab: int = 320) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return {key: value.value for key, value in read_tokenizer(folder, n_vocab, config, PRE_TOKENIZERS).items()}


def test_tokens_types_and_padding(tmp_path: Path) -> None:
    values = read(make_checkpoint(tmp_path / "c", weights={}))
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert tokens[256:263] == ["he", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "[PAD262]"]
    assert types[255:263] == [1, 1, 3, 3, 3, 3, 3, 5]
    assert len(tokens) == len(types) == 320
    assert values["tokenizer.ggml.pre"] == "qwen35"
    assert values["tokenizer.ggml.merges"] == ["h e"]
    assert values["tokenizer.ggml.eos_token_id"] == 259
    assert values["tokenizer.ggml.padding_token_id"] == 257
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.bos_token_id" not in values
    assert "im_start" in values["tokenizer.chat_template"]


def test_merges_as_texts_and_as_pairs_are_the_same(tmp_path: Path) -> None:
    as_text = folder_with(tmp_path, lambda content: content["model"].update(merges=["h e"]))
    assert read(as_text)["tokenizer.ggml.merges"] == ["h e"]


def test_breaks_today_05_a_fine_tune_with_an_added_token_converts(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights={})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(added=["<tool>", "<|new|>"])))
    values = read(folder)
    assert values["tokenizer.ggml.pre"] == "qwen35"
    assert values["tokenizer.ggml.tokens"][262:264] == ["<tool>", "<|new|>"]
    assert values["tokenizer.ggml.token_type"][262:264] == [4, 3]


def test_an_end_of_generation_that_no_runtime_guesses_is_written(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, lambda c: c.update(eos_token_id=[259, 257, 261]), "generation_config.json")
    assert read(folder)["tokenizer.ggml.eot_token_id"] == 261


def test_named_templates_and_jinja_files(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    folder = folder_with(tmp_path, lambda c: c.update(chat_template=templates), "tokenizer_config.json")
    values = read(folder)
    assert values["tokenizer.chat_template"] == "A"
    assert values["tokenizer.chat_templates"] == ["tool_use"]
    assert values["tokenizer.chat_template.tool_use"] == "B"
    (folder / "chat_template.jinja").write_text("C")
    assert read(folder)["tokenizer.chat_template"] == "C"


def regex(pattern: str) -> Change:
    return lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": pattern})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (regex(r"\w+"), r"the split regex .* is none that we know: qwen35, qwen2"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "not one Split by a regex, then ByteLevel"),
        (lambda c: c.update(pre_tokenizer=None), "not one Split by a regex"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "adds a space in front"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "normalizer .*Lowercase"),
        (lambda c: c["model"].update(ignore_merges=True), "ignore_merges is set"),
        (lambda c: c["model"].update(type="Unigram"), "model type 'Unigram', expected BPE"),
        (lambda c: c["model"].update(merges=[]), "merges is missing"),
        (lambda c: c["model"].update(merges=[["a", "b", "c"]]), "something else than pairs"),
        (lambda c: c["model"].update(merges=[7]), "something else than pairs"),
        (lambda c: c["model"]["merges"].append(["e", "h"]), r"merges into something that model.vocab lacks(.|\n)*e h"),
        (lambda c: c["model"]["vocab"].update(x=3), "gives 257 tokens only 256 different ids"),
        (lambda c: c["model"].pop("vocab"), "vocab is missing"),
        (lambda c: c.update(model=7), "model: 7, expected an object"),
        (
            lambda c: c["added_tokens"][0].update(id=400),
            r"beyond the embedding's 320 rows(.|\n)*400: '<\|endoftext\|>'",
        ),
        (lambda c: c["added_tokens"][4].update(id=300), r"gives these tokens other ids(.|\n)*</think>"),
    ],
)
def test_tokenizers_that_would_convert_wrong_are_refused(change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        read(folder_with(tmp_path, change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "generation_config.json",
            lambda c: c.update(eos_token_id=9999),
            r"generation_config.json eos_token_id: 9999",
        ),
        ("generation_config.json", lambda c: c.update(eos_token_id=[1, 2, 3]), "3 more end-of-generation tokens"),
        (
            "tokenizer_config.json",
            lambda c: c.update(added_tokens_decoder={"257": {"content": "<other>"}}),
            "tokenizer_config.json: added token 257 is '<other>', and '<|endoftext|>' in tokenizer.json".replace(
                "|", r"\|"
            ),
        ),
        ("tokenizer_config.json", lambda c: c.update(chat_template=3), "chat_template: 3, expected a text or a list"),
    ],
)
def test_settings_that_contradict_are_refused(name: str, change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        read(folder_with(tmp_path, change, name))


def test_embedding_smaller_than_the_tokenizer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", weights={})
    with pytest.raises(TokenizerError, match="beyond the embedding's 260 rows"):
        read_tokenizer(folder, 260, text_config(), PRE_TOKENIZERS)


def test_where_the_library_is_not_asked_it_would_say_the_same() -> None:
    rng, n_known = random.Random(0), 0
    for _ in range(400):
        content = tokenizer_json(added=["<a>", "<b>"])
        added, vocab = content["added_tokens"], content["model"]["vocab"]
        for _ in range(rng.randint(0, 2)):
            change, token = rng.randrange(6), rng.choice(list(vocab))
            if change == 0:
                rng.choice(added)["id"] = rng.randint(250, 270)
            elif change == 1:
                rng.shuffle(added)
            elif change == 2:
                added.pop(rng.randrange(len(added)))
            elif change == 3:
                added.insert(rng.randrange(len(added)), {**added[0], "content": token, "id": vocab[token]})
            elif change == 4:
                added.append(dict(rng.choice(added)))
            else:
                vocab[rng.choice(added)["content"]] = rng.randint(257, 264)
        if len(set(vocab.values())) == len(vocab) and _is_numbered_as_listed(content):
            n_known += 1
            listed = vocab | {item["content"]: item["id"] for item in added}
            assert Tokenizer.from_str(json.dumps(content)).get_vocab(with_added_tokens=True) == listed
    assert n_known > 100
