"""What PEFT makes of a tied model: what it saves, and what the model computes with once the adapter is loaded.

    python peft_tied.py CHECKPOINT FOLDER CASES

CASES is a JSON file: name -> [settings for LoraConfig, rows to resize the vocabulary to or 0]. Saves each adapter to
FOLDER/name; where it can be loaded onto the checkpoint, writes FOLDER/name/effective.npz with embedding and head as the
loaded model has them, before merging. Prints the names and shapes of what was saved.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

KEPT = ("target_modules", "modules_to_save", "ensure_weight_tying")


def open_base(checkpoint: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def make(checkpoint: str, folder: Path, settings: dict[str, Any], rows: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = open_base(checkpoint)
    if rows:
        model.resize_token_embeddings(rows)
    trained = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    trained.save_pretrained(folder)
    saved = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    if not rows:
        loaded = PeftModel.from_pretrained(open_base(checkpoint), folder).eval()
        with torch.no_grad():
            embedding = loaded.get_input_embeddings()(torch.arange(320))
            head = loaded.get_output_embeddings()(torch.eye(256)).T
        np.savez(folder / "effective.npz", embedding=embedding.numpy(), head=head.numpy())
    return {
        "settings": {
            key: sorted(value) if isinstance(value := config[key], list) else value for key in KEPT if config[key]
        },
        "tensors": {name: list(tensor.shape) for name, tensor in saved.items()},
    }


transformers.logging.set_verbosity_error()
checkpoint, target = sys.argv[1], Path(sys.argv[2])
cases = json.loads(Path(sys.argv[3]).read_text())
made = {name: make(checkpoint, target / name, settings, rows) for name, (settings, rows) in cases.items()}
print(json.dumps({"peft": peft.__version__, "cases": made}))
