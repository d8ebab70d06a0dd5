"""A GGUF as a source: what a checkpoint's config has to fulfil, its metadata has to, too.

`open_gguf` checks names and sizes, as looking at a file needs them. A file that is to be written anew must also load
and compute the right thing: what llama.cpp asks for is there, what it would compute with is within reason. The
architecture's table says what that is, and which keys that other tools leave out can be made good, with a note.

Source for the vocabulary: `llama_vocab::impl::load` of llama.cpp's src/llama-vocab.cpp, as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pocketquant.architectures import architecture_named
from pocketquant.architectures.table import Architecture
from pocketquant.errors import ArchitectureError, listing
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.model import Model, Role

_VOCABULARY = "tokenizer.ggml."


def open_gguf_source(path: Path | str) -> Model:
    """Opens a GGUF to make another file of it.

    Raises:
        SourceError, ArchitectureError: as `open_gguf`; and metadata that no runtime could use (all of it listed).
    """
    model = open_gguf(path)
    architecture = architecture_named(model.architecture)
    if completed := architecture.complete(model.metadata):
        metadata = {**model.metadata, **{key: value for key, (value, _) in completed.items()}}
        notes = (f"{key}: {note}" for key, (_, note) in completed.items())
        model = replace(model, metadata=metadata, notes=(*model.notes, *notes))
    problems = list(architecture.find_problems(model.metadata))
    if architecture.is_text:
        problems += _find_vocabulary_problems(model, architecture)
    if problems:
        raise ArchitectureError(
            f"{path}: metadata that llama.cpp does not load or computes nonsense with; take the checkpoint, or a file "
            f"that `check` finds nothing wrong with:\n{listing(problems)}"
        )
    return model


def _find_vocabulary_problems(model: Model, architecture: Architecture) -> Iterator[str]:
    """Why llama.cpp would not load the tokenizer, would end with it, or would split texts otherwise; one line each."""
    stated = {
        key.removeprefix(_VOCABULARY): value for key, value in model.metadata.items() if key.startswith(_VOCABULARY)
    }
    for key, kind in (("model", "str"), ("pre", "str"), ("tokens", "str[]"), ("merges", "str[]")):
        if key not in stated or stated[key].kind != kind or not stated[key].value:
            yield f"{_VOCABULARY}{key}: missing, empty or of another type"
    if "model" in stated and stated["model"].value != "gpt2":
        yield f"{_VOCABULARY}model: {str(stated['model'].value)[:40]!r}, this family has 'gpt2'"
    known = [item.name for item in architecture.pre_tokenizers]
    if "pre" in stated and stated["pre"].value not in known:
        yield f"{_VOCABULARY}pre: {str(stated['pre'].value)[:40]!r}, this family has {' or '.join(map(repr, known))}"
    if "tokens" not in stated or stated["tokens"].kind != "str[]":
        return
    tokens = stated["tokens"].value
    n_rows = next((tensor.n_rows for tensor in model.tensors if tensor.role is Role.EMBED), len(tokens))
    if n_rows != len(tokens):
        yield f"{_VOCABULARY}tokens: {len(tokens)} for an embedding of {n_rows} rows"
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        yield f"{_VOCABULARY}tokens: {len(twice)} texts stand twice, such as {twice[0]!r:.80}"
    types = stated.get("token_type")
    if types is not None and (types.kind not in ("i32[]", "u32[]") or len(types.value) != len(tokens)):
        yield f"{_VOCABULARY}token_type: expected a whole number for each of {len(tokens)} tokens"
    for key, value in stated.items():
        if key.endswith("_token_id") and (type(value.value) is not int or not 0 <= value.value < len(tokens)):
            yield f"{_VOCABULARY}{key}: {str(value.value)[:40]}, no id of {len(tokens)} tokens"
