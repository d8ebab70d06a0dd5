"""What a checkpoint says about itself -> `general.*` metadata: its model card, its name, how it wants to be sampled.

Which key comes from what is gguf-py's to say (`Metadata.apply_metadata_heuristic`, 0.19), so that files are described
as llama.cpp's converter describes them. What it is given is read and checked here: it trusts its input. A card only
describes, so what is broken in it is left out, with a note; how a model is sampled decides what it says, so a broken
generation_config.json is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketquant.errors import SourceError, listing
from pocketquant.files.small import is_present, read_object, read_optional_object, read_text
from pocketquant.gguf_file.values import KINDS, find_problem, shown
from pocketquant.model import Value

MAX_CARD_BYTES = 4 << 20
MAX_FRONT_MATTER = 1 << 16
"""Characters of a card's front matter: a parser that is written in Python takes a second for them."""

_TEXTS = ("name", "author", "version", "organization", "description", "finetune", "basename", "size_label")
_TEXT_KEYS = {
    *_TEXTS,
    *(f"model_{key}" for key in _TEXTS),
    *("url", "doi", "uuid", "repo_url", "model_url", "model_doi", "model_uuid", "model_repo_url"),
    *("model_creator", "model_type", "license_name", "license_link"),
}
_LIST_KEYS = {"license", "tags", "pipeline_tag", "languages", "language"}
_MODEL_KEYS = {"base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources"}
"""Keys of a card that gguf-py reads: texts; texts or lists of them; the same with objects of texts among them."""

_SAMPLING = {
    "sequence": ("sequence", "str"),
    "top_k": ("top_k", "i32"),
    "top_p": ("top_p", "f32"),
    "min_p": ("min_p", "f32"),
    "xtc_probability": ("xtc_probability", "f32"),
    "xtc_threshold": ("xtc_threshold", "f32"),
    "temp": ("temperature", "f32"),
    "penalty_last_n": ("penalty_last_n", "i32"),
    "penalty_repeat": ("repetition_penalty", "f32"),
    "mirostat": ("mirostat", "i32"),
    "mirostat_tau": ("mirostat_tau", "f32"),
    "mirostat_eta": ("mirostat_eta", "f32"),
}
"""gguf-py's name -> the key of generation_config.json and its type in GGUF."""


def describe_folder(
    folder: Path, n_weights: int, notes: list[str], n_expert: int = 0, expert_weights: int = 0
) -> dict[str, Value]:
    """The `general.*` keys that gguf-py finds out from a checkpoint's model card, configs and folder name.

    Args:
        folder: of the checkpoint.
        n_weights: in all.
        notes: what is left out of the card is added here.
        n_expert: experts of a block, 0 where there are none.
        expert_weights: of one expert, summed over the blocks.

    Raises:
        SourceError: generation_config.json cannot be read, or asks for what no sampler has; a folder whose name is no
            UTF-8.
    """
    import gguf

    if problem := find_problem(Value("str", folder.name)):
        raise SourceError(f"{folder}: the folder's name, which becomes the model's, {problem}; rename it")
    card = _read_card(folder / "README.md", notes)
    origin = read_object(folder / "config.json").get("_name_or_path")
    if not isinstance(origin, str | None):
        notes.append(f"config.json: _name_or_path left out: {shown(origin)} is no text")
    described = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), card, {"_name_or_path": origin} if isinstance(origin, str) else {}, folder, n_weights
    )
    for name, value in read_sampling(folder / "generation_config.json").items():
        setattr(described, f"sampling_{name}", value)
    if described.name is None:
        described.name = folder.name
    if described.size_label is None:
        described.size_label = gguf.size_label(
            n_weights, n_weights - n_expert * expert_weights, expert_weights, n_expert
        )
    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].clear()
    described.set_gguf_meta_model(writer)
    found = {key: _value(item) for key, item in writer.kv_data[0].items()}
    problems = {key: problem for key, value in found.items() if (problem := find_problem(value))}
    notes += [f"model card: {key} left out: {problem}" for key, problem in problems.items()]
    return {key: value for key, value in found.items() if key not in problems}


def read_sampling(path: Path) -> dict[str, Any]:
    """gguf-py's names -> the sampling settings of generation_config.json that are there.

    Raises:
        SourceError: it cannot be read, or holds values of another type (all listed).
    """
    settings = read_optional_object(path)
    found: dict[str, Any] = {}
    problems = []
    for name, (key, kind) in _SAMPLING.items():
        value = settings.get(name if name == "penalty_repeat" and name in settings else key)
        if value is None:
            continue
        if problem := find_problem(Value(kind, value)):
            problems.append(f"{key}: {problem}")
        found[name] = value
    if problems:
        raise SourceError(f"{path}: not how a model can be sampled; correct or delete these:\n{listing(problems)}")
    return found


# ---------------------------------------------------------------- model card


def _read_card(path: Path, notes: list[str]) -> dict[str, Any]:
    """The front matter's keys that gguf-py reads, of the types that it reads them as."""
    try:
        text = read_text(path, MAX_CARD_BYTES) if is_present(path) else ""
        front = _front_matter(text)
        if len(front) > MAX_FRONT_MATTER:
            raise SourceError(f"{path}: front matter of {len(front)} characters, more than {MAX_FRONT_MATTER}")
    except SourceError as error:
        notes.append(f"model card passed over: {error}")
        return {}
    try:
        import yaml

        card = yaml.load(front, _loader()) if front else {}
    except Exception as error:  # PyYAML's constructors raise whatever a damaged value leads them to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        notes.append(f"model card passed over: {path}: broken YAML: {reason:.200}")
        return {}
    if not isinstance(card, dict):
        notes.append(f"model card passed over: {path}: its front matter is no list of keys and values")
        return {}
    readable = {key: _readable(key, value, path, notes) for key, value in card.items() if isinstance(key, str)}
    return {key: value for key, value in readable.items() if value is not None}


def _front_matter(text: str) -> str:
    """The lines between the first two `---`, changed as gguf-py changes them; "" where there are none."""
    lines = text.splitlines()
    if not lines or lines[0] != "---":
        return ""
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    return ("\n".join(lines[1:end]) + "\n").replace("\t", "  ")


def _loader() -> Any:
    """Reads every scalar but null as the text it is: a version 1.50 is no number, a language `no` no boolean."""
    import yaml

    class TextLoader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    TextLoader.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return TextLoader


def _readable(key: str, value: Any, path: Path, notes: list[str]) -> Any:
    """A value as gguf-py takes it; None for what it does not read and, noted, for what it would fall over."""
    if value is None or key not in _TEXT_KEYS | _LIST_KEYS | _MODEL_KEYS:
        return None
    if _is_text(value):
        return value
    if isinstance(value, list) and key not in _TEXT_KEYS:
        items = [item for item in value if _is_text(item) or (key in _MODEL_KEYS and _is_described(item))]
        if len(items) < len(value):
            notes.append(f"model card: {path}: {key}: {len(value) - len(items)} entries left out, which are no texts")
        return items
    notes.append(f"model card: {path}: {key} left out: {shown(value)} is no text")
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not find_problem(Value("str", value))


def _is_described(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(part) for pair in value.items() for part in pair)


def _value(item: Any) -> Value:
    """gguf-py leaves an array's item type out until it writes it; every array here is one of strings."""
    kind = KINDS[item.type]
    return Value("str[]" if kind == "[]" else kind, item.value)
