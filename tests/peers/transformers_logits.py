"""What transformers computes in f32 on a CPU. Started with an interpreter that has torch.

    python transformers_logits.py CHECKPOINT IDS.npy OUT.npz

OUT.npz holds `logits` f32[n, n_vocab], and for a mixture of experts `tokens` i64[n_layer, n_expert]: how many tokens
each expert was chosen for.
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

checkpoint, ids, out = sys.argv[1:]
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager")
tokens = []


def count(module, arguments, result):
    tokens.append(np.bincount(result[2].reshape(-1).numpy(), minlength=module.num_experts))


for module in model.modules():
    if type(module).__name__.endswith("TopKRouter"):
        module.register_forward_hook(count)
with torch.no_grad():
    logits = model(input_ids=torch.from_numpy(np.load(ids)[None])).logits[0].numpy()
np.savez(out, logits=logits, tokens=np.array(tokens))
