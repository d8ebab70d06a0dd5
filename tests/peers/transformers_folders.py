"""What transformers makes of folders, as JSON on stdout: of their tokenizer, or of their output head.

python transformers_folders.py tokens|heads FOLDER [FOLDER ...]
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

TEXTS = ("a <|tool_boundary|> b", "x <mark> y", "x<mark>y")


def tokens_of(folder: str) -> dict[str, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except TypeError as error:
        return {"error": str(error)}
    added = {number: [token.content, token.special] for number, token in tokenizer.added_tokens_decoder.items()}
    ids = [tokenizer(text).input_ids for text in TEXTS]
    return {"length": len(tokenizer), "eos": tokenizer.eos_token_id, "added": added, "ids": ids}


def head_of(folder: str) -> dict[str, Any]:
    """Whether the head is the embedding, for each class that the folder can be loaded as; None: it is random."""
    found = {}
    for loader in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model, info = loader.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        is_random = any("lm_head" in name for name in info["missing_keys"])
        found[type(model).__name__] = None if is_random else bool(torch.equal(embedding, head))
    return found


def weights_of(folder: str) -> list[float]:
    """The first numbers of the embedding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.get_input_embeddings().weight[0, :8].tolist()


transformers.logging.set_verbosity_error()
ask = {"tokens": tokens_of, "heads": head_of, "weights": weights_of}[sys.argv[1]]
answers = {Path(folder).name: ask(folder) for folder in sys.argv[2:]}
print(json.dumps({"transformers": transformers.__version__, "cases": answers}))
