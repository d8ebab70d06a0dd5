"""Gradients twice: layer by layer as `pocketquant.calibration.fisher` does, and of transformers' whole model at once.

    python curvature_run.py REPOSITORY GGUF CHECKPOINT WINDOWS.npy FOLDER N_WHOLE

Started with an interpreter that has torch. FOLDER/gradients is the statistics file; FOLDER/whole.npz holds, over the
first N_WHOLE windows, E[x x^T] and E[g g^T] of every linear layer of the blocks under the checkpoint's names and in its
order, as `input NAME` and `output NAME`, and `output embed`; of experts, `NAME N` for expert N, summed over the tokens
that it got and divided by all. FOLDER/few is the statistics file of those windows.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

repository, gguf, checkpoint, windows_path, folder, n_whole = sys.argv[1:]
sys.path.insert(0, repository)

from pocketquant.calibration.fisher import FisherSettings, collect_fisher  # noqa: E402
from pocketquant.gguf_file.opening import open_gguf  # noqa: E402
from pocketquant.texts.corpus import TextRecord  # noqa: E402

SEED = 5
windows = np.load(windows_path)
texts = [TextRecord("text", windows.size, "0" * 64)]
model, out = open_gguf(gguf), Path(folder)
collect_fisher(model, windows, texts, out / "gradients", FisherSettings(threads=1, seed=SEED))
in_twos = FisherSettings(batch=2, threads=1, seed=SEED)
collect_fisher(model, windows[: int(n_whole)], texts, out / "few", in_twos)


class Interrupt(Exception):
    """Stands for whatever stops a run."""


for stop_after in (2, 6, 8):  # forwards, at the head, backwards

    def stop(done, total, stop_after=stop_after):
        if done == stop_after:
            raise Interrupt

    try:
        collect_fisher(model, windows[: int(n_whole)], texts, out / "again", in_twos, resume=True, progress=stop)
    except Interrupt:
        assert not (out / "again").exists()
collect_fisher(model, windows[: int(n_whole)], texts, out / "again", in_twos, resume=True)
assert (out / "again").read_bytes() == (out / "few").read_bytes()
assert not (out / ".again.states").exists()

whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager")
inputs, outputs = {}, {}


def add(sums, name, rows):
    rows = rows.detach().reshape(-1, rows.shape[-1]).double()
    sums[name] = sums.get(name, 0) + rows.T @ rows


def watch(name):
    def hook(module, arguments, output):
        if hasattr(module, "in_features"):
            add(inputs, name, arguments[0])
        output.register_hook(lambda gradient: add(outputs, name, gradient))

    return hook


for name, module in whole.named_modules():
    if isinstance(module, torch.nn.Linear) and ".layers." in name:
        module.register_forward_hook(watch(name[name.index("layers.") :]))
fused = {id(p): name[name.index("layers.") :] for name, p in whole.named_parameters() if ".experts." in name}
multiply = torch.nn.functional.linear


def watching(rows, weight, bias=None):
    """An expert's weight is a view of the parameter of all of them, and lies so many matrices behind its start."""
    output = multiply(rows, weight, bias)
    if id(weight._base) in fused:
        name = f"{fused[id(weight._base)]} {weight.storage_offset() // weight.numel()}"
        add(inputs, name, rows)
        output.register_hook(lambda gradient: add(outputs, name, gradient))
    return output


torch.nn.functional.linear = watching
whole.get_input_embeddings().register_forward_hook(watch("embed"))
whole.get_input_embeddings().weight.requires_grad_(True)
for i, window in enumerate(windows[: int(n_whole)]):
    logits = whole(input_ids=torch.from_numpy(window[None].astype(np.int64))).logits[0].double()
    sums = torch.softmax(logits, -1).detach().cumsum(-1)
    draws = torch.from_numpy(np.random.default_rng((SEED, i)).random(len(window)))
    labels = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)[:, 0]
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
n_tokens = windows[: int(n_whole)].size
arrays = {f"input {name}": (total / n_tokens).numpy() for name, total in inputs.items()}
arrays |= {f"output {name}": (total / n_tokens).numpy() for name, total in outputs.items()}
np.savez(out / "whole.npz", **arrays)
