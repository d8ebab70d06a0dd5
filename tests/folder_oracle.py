"""What transformers makes of the folders in `token_cases` and of flags that tie the head: asked anew, or as kept."""

from __future__ import annotations

import json
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_maker import weights_for, write_json_files, write_safetensors
from token_cases import REFUSED, TAKEN, write_case
from vision_maker import both_config

GOLDEN = Path(__file__).parent / "golden/folders.json"
SCRIPT = Path(__file__).parent / "peers/transformers_folders.py"
FLAGS = (True, False, None)
HEADS = ("none", "same", "other")
TIES = {f"{top} {text} {head}": (top, text, head) for top, text, head in product(FLAGS, FLAGS, HEADS)}
"""`tie_word_embeddings` at the top of a vision-language config, in its text_config, and the head that is stored."""


def write_tie_case(folder: Path, top: bool | None, text: bool | None, head: str) -> Path:
    """A vision-language checkpoint without its tower; None leaves a flag out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = both_config()
    for owner, flag in ((config, top), (config["text_config"], text)):
        owner["tie_word_embeddings"] = flag
        if flag is None:
            del owner["tie_word_embeddings"]
    weights = weights_for({**config["text_config"], "architectures": config["architectures"], "tie_word_embeddings": 1})
    weights = {name.replace("model.", "model.language_model."): values for name, values in weights.items()}
    embedding = weights["model.language_model.embed_tokens.weight"]
    if head != "none":
        other = np.random.default_rng(9).standard_normal(embedding.shape).astype(np.float32)
        weights["lm_head.weight"] = embedding if head == "same" else other
    write_json_files(folder, config)
    write_safetensors(folder / "model.safetensors", weights)
    return folder


def ask_transformers(python: Path | str, folder: Path) -> dict[str, Any]:
    """Writes every case into a folder and returns what transformers makes of it."""
    cases = {**TAKEN, **{name: files for name, (files, _) in REFUSED.items()}}
    asked = {
        "tokens": [write_case(folder / "tokens" / name, files) for name, files in cases.items()],
        "heads": [write_tie_case(folder / "heads" / name, *case) for name, case in TIES.items()],
    }
    answers: dict[str, Any] = {}
    for what, folders in asked.items():
        answer = ask(python, what, folders)
        answers["transformers"] = answer["transformers"]
        answers[what] = answer["cases"]
    return answers


def ask(python: Path | str, what: str, folders: list[Path]) -> dict[str, Any]:
    """What transformers makes of folders; `what` as in the script."""
    run = subprocess.run([python, SCRIPT, what, *folders], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout)


def kept() -> dict[str, Any]:
    """The same as kept in tests/golden."""
    return json.loads(GOLDEN.read_text())
