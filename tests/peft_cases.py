"""Adapters of a tied model, as PEFT makes and saves them: asked anew, or as kept in tests/golden/peft_names.json."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden/peft_names.json"
SCRIPT = Path(__file__).parent / "peers/peft_tied.py"
Q = "layers.3.self_attn.q_proj"
BOTH = ["embed_tokens", "lm_head"]
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "head": ({"target_modules": ["lm_head", Q]}, 0),
    "embedding": ({"target_modules": ["embed_tokens", Q]}, 0),
    "embedding and head": ({"target_modules": BOTH}, 0),
    "head trained whole": ({"target_modules": [Q], "modules_to_save": ["lm_head"]}, 0),
    "embedding trained whole": ({"target_modules": [Q], "modules_to_save": ["embed_tokens"]}, 0),
    "embedding and head trained whole": ({"target_modules": [Q], "modules_to_save": BOTH}, 0),
    "one embedding": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, 0),
    "one embedding trained whole": (
        {"target_modules": [Q], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        0,
    ),
    "norms": ({"target_modules": [Q], "modules_to_save": ["norm"]}, 0),
    "DeltaNet": ({"target_modules": [Q], "modules_to_save": ["linear_attn"]}, 0),
    "resized": ({"target_modules": [Q]}, 328),
    "resized, trained whole": ({"target_modules": [Q], "modules_to_save": BOTH}, 328),
}
"""Settings of LoraConfig, and the rows that the vocabulary was resized to before training, 0 for none."""


def ask_peft(python: Path | str, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Has PEFT make every adapter in a folder of its name; what it saves, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(CASES))
    run = subprocess.run([python, SCRIPT, checkpoint, folder, folder / "cases.json"], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    answers = json.loads(run.stdout.splitlines()[-1])
    for case in answers["cases"].values():
        saved = case["settings"].get("modules_to_save", [])
        case["trained"] = sum(is_trained(name, saved) for name in case["tensors"])
    return answers


def is_trained(name: str, saved: list[str]) -> bool:
    """Whether a tensor stands under the plain name of a weight that was trained whole."""
    modules = name.split(".")[:-1]
    paths = [".".join(modules[: i + 1]) for i in range(len(modules))]
    return "lora_" not in name and any(path.endswith(end) for path in paths for end in saved)
