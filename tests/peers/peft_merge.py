"""Trains nothing: lets PEFT make adapters with random matrices, save and merge them. Started by the peer tests.

    python peft_merge.py CASES

CASES is a JSON file: a list of [checkpoint, folder, settings for LoraConfig]. Writes each adapter to FOLDER/lora, and
checkpoints merged in a model of either type to FOLDER/merged-f32 and FOLDER/merged-bf16.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def make_and_merge(checkpoint: Path, folder: Path, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    trained = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:  # B starts as zero, and an embedding's A too
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    trained.save_pretrained(folder / "lora")
    for dtype in (torch.float32, torch.bfloat16):
        base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        merged = PeftModel.from_pretrained(base, folder / "lora").merge_and_unload()
        target = folder / ("merged-f32" if dtype is torch.float32 else "merged-bf16")
        merged.save_pretrained(target)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (checkpoint / name).exists():
                shutil.copy(checkpoint / name, target / name)


for checkpoint, folder, settings in json.loads(Path(sys.argv[1]).read_text()):
    make_and_merge(Path(checkpoint), Path(folder), settings)
