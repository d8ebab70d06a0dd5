"""Trains the small hybrid checkpoint that the package embeds. Needs `tools/requirements.txt`; the package never does.

    python tools/demo_texts.py SOURCES WORK           # gathers the texts, see there
    python tools/train_demo.py tokenizer WORK         # WORK/tokenizer.json
    python tools/train_demo.py train WORK             # WORK/latest.pt every few minutes; stops and resumes anywhere
    python tools/train_demo.py export WORK FOLDER     # the checkpoint in Hugging Face's layout, BF16

The architecture is transformers' own `Qwen3_5ForCausalLM`, so its forward pass is the definition of the weights.
Loss goes to WORK/train.jsonl. Seeds are fixed; the same machine, versions and thread count repeat the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig

N_VOCAB = 1536  # rows of the embedding, more than the tokenizer has entries, as in the published models
N_BPE = 1495
ADDED = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False, "</think>": False}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # the family's split, as its tokenizer.json has it
STEP_TOKENS = 2048
WARM_UP_STEPS = 60
PEAK_RATE = 3e-3
MAX_BYTES = 8_000_000


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE with the family's normalizer, split and decoder; added tokens follow the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token in ADDED:
        text = text.replace(token, "\n")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=N_BPE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t, special in ADDED.items()])
    return tokenizer


def encode_documents(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.int64]:
    """All documents of a text as one stream of ids, each closed by the end-of-text token."""
    end = "<|endoftext|>"
    encoded = tokenizer.encode_batch([document + end for document in text.split(end)])
    return np.concatenate([np.array(e.ids, np.int64) for e in encoded])


def make_config(tokenizer: Tokenizer) -> Qwen3_5TextConfig:
    """Three DeltaNet blocks and one of full attention; two value heads to each key head, tied embeddings."""
    return Qwen3_5TextConfig(
        architectures=["Qwen3_5ForCausalLM"],
        vocab_size=N_VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=262_144,
        tie_word_embeddings=True,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        rope_parameters={
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000.0,
            "rope_type": "default",
        },
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        dtype="bfloat16",
    )


def loss_of(model: Qwen3_5ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats of ids[:, 1:], ids i64[batch, n + 1]."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Qwen3_5ForCausalLM, stream: npt.NDArray[np.int64], n_windows: int = 64) -> float:
    """Mean loss in nats a token over the first windows of 256."""
    windows = torch.from_numpy(stream[: n_windows * 256 + 1]).unfold(0, 257, 256)
    return float(np.mean([loss_of(model, batch).item() for batch in windows.split(8)]))


def learning_rate(step: int, n_steps: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < WARM_UP_STEPS:
        return PEAK_RATE * (step + 1) / WARM_UP_STEPS
    progress = min(1.0, (step - WARM_UP_STEPS) / max(1, n_steps - WARM_UP_STEPS))
    return PEAK_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_at(stream: npt.NDArray[np.int64], step: int) -> torch.Tensor:
    """The step's windows, drawn at random: eight of 256 tokens, or at every fourth step four of 512."""
    length = 512 if step % 4 == 3 else 256
    starts = np.random.default_rng([17, step]).integers(0, len(stream) - length - 1, STEP_TOKENS // length)
    return torch.from_numpy(np.stack([stream[start : start + length + 1] for start in starts]))


def make_optimizer(model: Qwen3_5ForCausalLM) -> torch.optim.AdamW:
    """AdamW; decay only on matrices, so that norms and DeltaNet's scalars stay free."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), eps=1e-8)


def train(work: Path, n_steps: int, save_seconds: float) -> None:
    """Trains from WORK/latest.pt or from scratch; a change of `n_steps` on resuming only moves the cosine."""
    torch.manual_seed(17)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    training = encode_documents(tokenizer, (work / "training.txt").read_text("utf-8"))
    held_out = encode_documents(tokenizer, (work / "evaluation.txt").read_text("utf-8"))
    model = Qwen3_5ForCausalLM(make_config(tokenizer)).float()
    optimizer = make_optimizer(model)
    first = 0
    if (work / "latest.pt").exists():
        state = torch.load(work / "latest.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    print(f"{len(training):,} training tokens, {sum(p.numel() for p in model.parameters()):,} weights, step {first}")

    started = saved = time.monotonic()
    with (work / "train.jsonl").open("a", encoding="utf-8") as log:
        for step in range(first, n_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, n_steps)
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch_at(training, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            now = time.monotonic()
            is_last = step + 1 == n_steps
            if step % 20 == 0 or is_last:
                line = {"step": step, "loss": round(loss.item(), 4), "seconds": round(now - started, 1)}
                print(json.dumps(line), file=log, flush=True)
            if is_last or now - saved > save_seconds:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, work / "latest.tmp")
                (work / "latest.tmp").replace(work / "latest.pt")
                line = {"step": step, "held_out": round(evaluate(model, held_out), 4)}
                print(json.dumps(line), file=log, flush=True)
                saved = time.monotonic()


def export(work: Path, folder: Path) -> None:
    """Writes weights, config and tokenizer; the other files of the checkpoint folder are kept by hand.

    Raises:
        SystemExit: the folder is over its limit.
    """
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    model = Qwen3_5ForCausalLM(make_config(tokenizer))
    model.load_state_dict(torch.load(work / "latest.pt", weights_only=True)["model"])
    ids = {token: tokenizer.token_to_id(token) for token in ADDED}
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {n_bytes:,} bytes")
    if n_bytes > MAX_BYTES:
        raise SystemExit(f"{folder} is {n_bytes:,} bytes; the limit is {MAX_BYTES:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["tokenizer", "train", "export"])
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=2_200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-seconds", type=float, default=180.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.task == "tokenizer":
        text = (args.work / "training.txt").read_text("utf-8")
        train_tokenizer(text).save(str(args.work / "tokenizer.json"))
    elif args.task == "train":
        train(args.work, args.steps, args.save_seconds)
    elif args.folder is None:
        parser.error("export needs a folder")
    else:
        export(args.work, args.folder)


if __name__ == "__main__":
    main()
