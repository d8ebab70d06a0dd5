"""Every file that may stand in a model's folder: what it is, and what is done with it.

A folder is listed once and every entry accounted for: what is not read is named in a note, with the reason. Which files
make the model is decided as transformers 5.24 does (`modeling_utils.py` `_get_resolved_checkpoint_files`,
`tokenization_utils_base.py` `from_pretrained`), as PEFT 0.21 (`utils/save_and_load.py`) and huggingface_hub name them.
docs/explain/model-folder.md shows `KINDS` to people.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from pocketquant.errors import SourceError
from pocketquant.escaping import note_name, one_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
"""PEFT's, PEFT's pickled, and mlx-lm's."""

_MOST_ENTRIES = 1 << 20
_NAMED = 8
_LONGEST_NAME = 80


@dataclass(frozen=True)
class FileKind:
    """Files of one kind.

    Attributes:
        patterns: their names; `*` stands for anything. A folder's ends with a slash.
        what: what they are.
        done: what is done with them.
        unread: why, where one of them was not read; "" where reading is not left to chance.
    """

    patterns: tuple[str, ...]
    what: str
    done: str
    unread: str = ""


KINDS = (
    FileKind(("config.json",), "the model's class and sizes, its data types, quantization and tied head", "read"),
    FileKind(
        (SINGLE,),
        "the weights in one file",
        "read, and before an index: shards of an older save may lie beside it",
        "weights of another save, or not the file that was named",
    ),
    FileKind(
        (INDEX,),
        "which shard holds which tensor",
        "read, with the shards that it names, where there is no model.safetensors",
        "the index of another save",
    ),
    FileKind(
        ("model-*-of-*.safetensors", "model.safetensors-*-of-*.safetensors"),
        "shards of the weights",
        "read if the index names them",
        "shards of another save",
    ),
    FileKind(
        (ADAPTER_CONFIG, *ADAPTER_WEIGHTS),
        "an adapter",
        "refused beside a model's weights unless --adapter names an adapter: whether transformers merges it depends "
        "on whether PEFT is installed",
        "an adapter that was not asked for",
    ),
    FileKind(
        ("*.safetensors", "*.safetensors.index.json"),
        "other weights, such as a variant (model.fp16.safetensors) or another program's (consolidated.safetensors)",
        "read only where config.json's transformers_weights names them, or as the folder's only weights",
        "not the weights that transformers loads",
    ),
    FileKind(("tokenizer.json",), "the tokenizer", "read"),
    FileKind(
        ("tokenizer_config.json",), "special tokens by name, more added tokens, and perhaps the chat template", "read"
    ),
    FileKind(
        ("special_tokens_map.json", "added_tokens.json"),
        "special and added tokens, as older versions of transformers saved them",
        "read unless tokenizer_config.json has an added_tokens_decoder, as transformers does",
    ),
    FileKind(("generation_config.json",), "end-of-generation tokens and sampling", "read"),
    FileKind(
        ("chat_template.jinja", "chat_template.json"),
        "the chat template",
        "read: the former before the latter before the one in tokenizer_config.json",
        "chat_template.jinja comes first",
    ),
    FileKind(
        ("additional_chat_templates/",),
        "further chat templates by name, as `*.jinja`",
        "read beside chat_template.jinja",
        "there is no chat_template.jinja beside it",
    ),
    FileKind(
        ("preprocessor_config.json", "processor_config.json"),
        "how images are scaled",
        "read where the checkpoint has a vision tower",
        "the checkpoint has no vision tower",
    ),
    FileKind(
        ("hf_quant_config.json", "quantize_config.json"),
        "how weights are quantized",
        "read where config.json does not say it, the former before the latter",
        "another file says how the weights are quantized",
    ),
    FileKind(("README.md",), "the model card", "read for what describes the model"),
    FileKind(
        ("vocab.json", "merges.txt"), "the vocabulary", "passed over", "tokenizer.json holds the vocabulary and merges"
    ),
    FileKind(
        ("tokenizer.model", "spiece.model", "*.tiktoken", "tekken.json", "tokenizer.*.json"),
        "tokenizers in other formats, or for other versions of transformers",
        "passed over; refused if tokenizer_config.json's fast_tokenizer_files has transformers load one",
        "tokenizer.json is the tokenizer",
    ),
    FileKind(
        ("config.*.json",),
        "configs for other versions of transformers",
        "passed over; refused if config.json's configuration_files has transformers load one",
        "config.json is the config",
    ),
    FileKind(
        (
            *("optimizer.*", "scheduler.pt", "rng_state*.pth", "scaler.pt", "training_args.bin", "trainer_state.json"),
            *("*_results.json", "global_step*/", "zero_to_fp32.py", "latest", "runs/", "events.out.*", "checkpoint-*/"),
        ),
        "what a trainer keeps to go on",
        "passed over",
        "a trainer's state",
    ),
    FileKind(
        ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
        "pickled weights",
        "passed over, and never opened: unpickling runs code",
        "pickled, which is never read",
    ),
    FileKind(
        ("*.gguf",),
        "a GGUF file",
        "passed over; give it as the source by its own name",
        "a GGUF is a source of its own",
    ),
    FileKind(
        ("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.npz", "*.mlpackage/", "onnx/", "openvino_*"),
        "weights for other programs",
        "passed over",
        "weights for other programs",
    ),
    FileKind(
        ("*.py",),
        "code that transformers runs with trust_remote_code",
        "passed over, and never run",
        "code, which is never run",
    ),
    FileKind(
        ("video_preprocessor_config.json", "image_processor_config.json", "configuration.json"),
        "settings of other inputs and of other hubs",
        "passed over",
        "nothing in a GGUF comes from it",
    ),
    FileKind(
        (
            *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*.md", "*.txt", "*.pdf", "*.png", "*.jpg", "*.jpeg"),
            *("*.gif", "*.svg", "*.webp", "*.yaml", "*.yml", "*.csv", "*.html", ".gitattributes", ".gitignore"),
            *(".git/", ".cache/", ".huggingface/", ".msc", ".mv", ".mdl"),
        ),
        "what describes the model, or belongs to a hub or to git",
        "passed over",
        "it describes, and decides nothing",
    ),
    FileKind(("*/",), "other folders", "not looked into", "folders are not looked into"),
    FileKind(("*",), "anything else", "passed over", "no file that a model is made of"),
)


def list_entries(folder: Path) -> tuple[str, ...]:
    """The names in a folder in their order, folders with a slash at their end.

    Raises:
        SourceError: it cannot be listed, or holds more than any model's folder.
    """
    try:
        with os.scandir(folder) as entries:
            names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in islice(entries, _MOST_ENTRIES)]
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed: {error.strerror}") from error
    if len(names) == _MOST_ENTRIES:
        raise SourceError(f"{folder}: holds {_MOST_ENTRIES} entries or more; give the model a folder of its own")
    for name in names:
        note_name(name)
    return tuple(sorted(names))


def top_level(names: Iterable[str]) -> tuple[str, ...]:
    """The same for all files of a repository, given by their paths."""
    return tuple(sorted({f"{name.split('/')[0]}/" if "/" in name else name for name in names}))


def kind_of(entry: str) -> FileKind:
    """The first kind that a name fits; the last kind fits every name."""
    return next(kind for kind, pattern in _compiled() if pattern.match(entry))


@cache
def _compiled() -> tuple[tuple[FileKind, re.Pattern[str]], ...]:
    """One expression for each kind: a folder may hold a hundred thousand files."""
    return tuple((kind, re.compile("|".join(map(_expression, kind.patterns)))) for kind in KINDS)


def _expression(pattern: str) -> str:
    """Patterns of files fit no folder."""
    return translate(pattern) if pattern.endswith("/") else rf"(?!(?s:.*/)\Z){translate(pattern)}"


def refuse_versions(path: Path, listed: Any, stem: str) -> None:
    """Refuses a config that has transformers load another file, made for its version, in place of a plain one.

    Args:
        path: the config.
        listed: what it has under `configuration_files` or `fast_tokenizer_files`.
        stem: "config" or "tokenizer".

    Raises:
        SourceError: it lists such a file.
    """
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    versions = [name for name in names if fnmatchcase(name, f"{stem}.*.json")]
    if versions:
        raise SourceError(
            f"{path}: has transformers load {named(versions)} in place of {stem}.json, according to its version; give "
            f"the file that is meant the name {stem}.json, and take the list out"
        )


def note_passed_over(entries: Collection[str], read: Collection[str]) -> list[str]:
    """A note for each reason why entries of a folder were not read, which names them; a few by name, then a count.

    Args:
        entries: from `list_entries`.
        read: names of files that were read, of those that are not always read.
    """
    left: dict[str, list[str]] = {}
    for entry in entries:
        kind = kind_of(entry)
        if kind.unread and entry not in read:
            left.setdefault(kind.unread, []).append(entry)
    return [f"passed over ({reason}): {named(names)}" for reason, names in left.items()]


def named(names: Collection[str]) -> str:
    """Eight names at most, each made safe to print, and how many more there are."""
    shown = ", ".join(one_line(name, _LONGEST_NAME) for name in islice(names, _NAMED))
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
