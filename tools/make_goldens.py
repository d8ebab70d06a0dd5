"""Writes the goldens of the embedded model. Needs `tools/requirements.txt`; run it only when the model changes.

    python tools/make_goldens.py            # tests/golden/demo_logits.npz and tests/golden/hard_text.json

`demo_logits.npz` holds what transformers computes in f32 on a CPU for four windows of the evaluation text:
    ids         i32[4, 256]         each window starts at position 0
    codes       u16[4, 256, 1536]   a logit is codes * step + offset, with its row's step and offset
    step        f32[4, 256]
    offset      f32[4, 256]
    nll_nats    f64                 mean over the 4 x 255 predicted tokens, before rounding to codes
    kl_floor    f64[2]              mean and largest KL divergence in nats that the codes alone cause
    sha256      str                 of model.safetensors
`hard_text.json` holds texts and the ids that the `tokenizers` library gives them, special tokens recognised.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from transformers import Qwen3_5ForCausalLM

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "pocketquant/demo/checkpoint"
EVALUATION = ROOT / "pocketquant/demo/text/evaluation.txt"
GOLDEN = ROOT / "tests/golden"
N_WINDOWS = 4
N_CTX = 256
KL_FLOOR_LIMIT = 1e-7

# In NFC throughout: the tokenizer normalizes to NFC and runtimes of GGUF do not.
# ruff: noqa: RUF001 -- confusable letters are the point of the texts below
HARD_TEXTS = {
    "plain": "Hello, world! It's the captain's log; we'll sail, they'd say, I'M HERE, you'Re not.",
    "latin": "Ångström naïve façade Größe œuvre Żółć İstanbul ıI ſ ŉ ﬁ ǅ",
    "greek and cyrillic": "Ὀδυσσεύς πολύτροπος; Съешь ещё этих мягких булок, её ѣ",
    "arabic and hebrew": "السَّلامُ عَلَيْكُمْ ١٢٣٤ ﷺ שָׁלוֹם עוֹלָם\u200f!",
    "devanagari and tamil": "क्षत्रिय नमस्ते दुनिया १२३ ॐ தமிழ் மொழி க்ஷ",
    "thai and burmese": "สวัสดีชาวโลก ก็ได้ ๔๕ မြန်မာစာ ភាសាខ្មែរ",
    "cjk": "漢字とひらがなカタカナ、한국어 조선말 ㍿ 𠮷野家 ①②③ 一二三、「終」",
    "combining marks": "x\u0323\u0302 q\u0303 Z\u0351\u036b\u035b \u0301alone a\u20dd \u0e31 1\u0301 !\u0301",
    "emoji": "👩\u200d👩\u200d👧\u200d👦 👍🏽 🏳\ufe0f\u200d🌈 🇳🇴🇯🇵 1\ufe0f\u20e3 ☃\ufe0e ❤\ufe0f",
    "digits": "0123456789 3.14159265358979323846 1e-10 0xDEADBEEF ½ ² Ⅷ ٣ ⑩ 1,000,000",
    "code": "def f(x: int) -> str:\n    if x<=0x1F and not(x>>2):\n\treturn f'{x!r:>{10}}'\n\n\n#!/bin/sh\n  \t  x+=1;",
    "symbols": "~!@#$%^&*()_+-={}[]|\\:\";'<>?,./ ≤≥∑√∞ €£¥ «»“”‘’ … — \u00ad\u2060",
    "spaces": " a  b   c    d     \t\te \t f  \n   g\n\n\n   \n h   ",
    "wide spaces": "a\u00a0b\u00a0\u00a0c\u3000d\u3000\u3000e\u2009f\u2028g\u2029h\u0085i\u200bj\ufeffk\u1680l\u202fm",
    "line ends": "one\r\ntwo\r\n\r\nthree\rfour\n\rfive  \r\n  six!\r\n\r\n?\n",
    "control": "a\u0001b\u007fc\u001bd\u000be\u000cf\u001cg\u001fh",
    "beyond the bmp": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𐍈𐌰 𓀀 \U000e0001 \U0010ffff \ue000 \ufffd \uffff",
    "special tokens": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHo<|im_end|>",
    "nearly special": "<|im_start|<|im_end|>|> <|im_start |> <think><think/></think>x <|endoftext|><|endoftext",
    "contractions": "'s 'S 'T 're 'VE 'll'd''s don't DON'T ’s x'’s 'ſ 'K",
}


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compute_logits(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """f32[windows, n, n_vocab] logits of transformers in f32, each window on its own, single-threaded."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model = Qwen3_5ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    with torch.no_grad():
        logits = [model(input_ids=torch.from_numpy(window[None].astype(np.int64))).logits[0].numpy() for window in ids]
    return np.stack(logits)


def pack_rows(
    logits: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Codes, steps and offsets of the rows: 65,536 even steps from the smallest logit to the largest."""
    offset = logits.min(-1)
    step = ((logits.max(-1) - offset) / np.float32(65535)).astype(np.float32)
    codes = np.rint((logits.astype(np.float64) - offset[..., None]) / step[..., None])
    return np.clip(codes, 0, 65535).astype(np.uint16), step, offset


def log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    shifted: npt.NDArray[np.float64] = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def write_logits(tokenizer: Tokenizer) -> None:
    """Writes demo_logits.npz.

    Raises:
        SystemExit: the codes themselves cost more than the limit.
    """
    stream = np.array(tokenizer.encode(EVALUATION.read_text("utf-8")).ids, np.int32)
    starts = np.linspace(0, len(stream) - N_CTX, N_WINDOWS).astype(int)
    ids = np.stack([stream[start : start + N_CTX] for start in starts])
    logits = compute_logits(ids)
    codes, step, offset = pack_rows(logits)
    exact = log_softmax(logits)
    stored = log_softmax(codes.astype(np.float32) * step[..., None] + offset[..., None])
    kl = (np.exp(exact) * (exact - stored)).sum(-1)
    nll = -np.take_along_axis(exact[:, :-1], ids[:, 1:, None].astype(np.int64), -1).mean()
    path = GOLDEN / "demo_logits.npz"
    np.savez_compressed(
        path,
        ids=ids,
        codes=codes,
        step=step,
        offset=offset,
        nll_nats=np.float64(nll),
        kl_floor=np.array([kl.mean(), kl.max()]),
        sha256=np.array(sha256_of(CHECKPOINT / "model.safetensors")),
    )
    print(f"{path.name}: {path.stat().st_size:,} bytes, NLL {nll:.4f}, KL floor {kl.mean():.2g}, worst {kl.max():.2g}")
    if kl.mean() > KL_FLOOR_LIMIT:
        raise SystemExit(f"storing the logits costs {kl.mean():.2g} nats; the limit is {KL_FLOOR_LIMIT:g}")


def write_hard_texts(tokenizer: Tokenizer) -> None:
    """Writes hard_text.json: every text on its own, and all of them as one."""
    texts = {**HARD_TEXTS, "all": "\n".join(HARD_TEXTS.values())}
    unstable = [name for name, text in texts.items() if unicodedata.normalize("NFC", text) != text]
    if unstable:
        raise SystemExit(f"not in NFC: {', '.join(unstable)}")
    cases = {name: {"text": text, "ids": tokenizer.encode(text).ids} for name, text in texts.items()}
    golden = {"tokenizer_sha256": sha256_of(CHECKPOINT / "tokenizer.json"), "cases": cases}
    (GOLDEN / "hard_text.json").write_text(json.dumps(golden, indent=1) + "\n", "utf-8")
    print(f"hard_text.json: {len(cases)} texts, {sum(len(case['ids']) for case in cases.values())} ids")


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    write_hard_texts(tokenizer)
    write_logits(tokenizer)


if __name__ == "__main__":
    main()
