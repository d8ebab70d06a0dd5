"""What a quantization of the largest sibling, 397B-A17B, takes: bytes from the plan, hours from this machine's kernels.

    python benchmarks/cost.py [RECIPE...]

The checkpoint is a hole in a sparse file with the model's shapes, opened and planned by the real planner. Every format
of the plan is then timed on one core, through the pipeline's own unit of work, on weights read from a file in the page
cache. Everything beyond bytes is an estimate: rates of this processor, links at their full speed, nothing else running.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant import open_model, open_recipe, plan
from pocketquant.cluster import BATCH_WEIGHTS
from pocketquant.convert.rows import CheckpointRows
from pocketquant.convert.safetensors import ITEM_BYTES, LocalFile, StoredTensor
from pocketquant.formats import FORMATS, F32Array
from pocketquant.formats.plain import encode_bf16
from pocketquant.gguf_file import writing as pipeline
from pocketquant.model import Plan, Role, Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from checkpoint_maker import make_sparse_checkpoint, moe_config

RECIPES = ("q4_k_m", "pocket_4bit", "q8_0")
CORES = (1, 2, 8, 32, 128)
GIGABITS = (1, 10, 25)
N_COLS, N_ROWS, REPEATS = 4096, 1024, 5
SCHEDULER_SECONDS = 0.003
"""Of processor time for one task, in the scheduler and as much in the client; measured with 149 and 737 tasks."""
LARGEST: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 60,
    "layer_types": None,
    "full_attention_interval": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
}
"""Width, blocks, experts and heads are published; DeltaNet's value heads, the experts' width and how many are used are
those with which 397e9 weights in all and 17e9 in use come out."""


@dataclass(frozen=True)
class Job:
    """One output of the model: weights of each format, bytes read and written, seconds of one core."""

    recipe: str
    read_bytes: int
    written_bytes: int
    bits_per_weight: float
    core_seconds: float
    n_tasks: int

    def seconds(self, cores: int, gigabits: float) -> tuple[float, str]:
        """Wall time with one link of that speed for reading and one for the results, and what it waits for."""
        link = gigabits * 1e9 / 8
        return max(
            (self.core_seconds / cores, "encoding"),
            (self.read_bytes / link, "reading"),
            (self.written_bytes / link, "results"),
            (self.n_tasks * SCHEDULER_SECONDS, "scheduling"),
        )


def measure_rate(tensor: Tensor, name: str, importance: F32Array | None) -> float:
    """Weights a second that one core reads, decodes and encodes, median of several chunks."""
    kind = FORMATS[name]
    pipeline.encode_rows(tensor, 0, 256, kind, importance)  # compiles
    step, seconds = pipeline.CHUNK_WEIGHTS // N_COLS, []
    for i in range(REPEATS):
        start = i * step % N_ROWS
        started = time.thread_time()
        pipeline.encode_rows(tensor, start, start + step, kind, importance)
        seconds.append(time.thread_time() - started)
    return step * N_COLS / sorted(seconds)[REPEATS // 2]


def cost(planned: Plan, rates: dict[str, float]) -> Job:
    weights: Counter[str] = Counter()
    read = 0
    for item in planned.tensors:
        n_weights = math.prod(item.tensor.shape)
        weights[item.format.name] += n_weights
        read += n_weights * ITEM_BYTES[item.tensor.dtype]
    n_tasks = math.ceil(sum(weights.values()) / BATCH_WEIGHTS)
    core_seconds = sum(n / rates[name] for name, n in weights.items())
    recipe = str(planned.metadata["pocketquant.recipe"].value)
    return Job(recipe, read, planned.file_bytes, planned.bits_per_weight, core_seconds, n_tasks)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main(recipes: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as name:
        model = open_model(make_sparse_checkpoint(Path(name) / "Qwen3.5-397B-A17B", moe_config(**LARGEST)))
        plans = [plan(model, open_recipe(recipe)) for recipe in recipes]
        random = np.random.default_rng(0)
        path = Path(name) / "weights"
        path.write_bytes(encode_bf16(random.standard_normal((N_ROWS, N_COLS), np.float32) * np.float32(0.02)).tobytes())
        stored = StoredTensor("weights", LocalFile(path), "BF16", (N_ROWS, N_COLS), 0)
        source = CheckpointRows(stored, stored.shape, None, None, None)
        tensor = Tensor("weights", Role.FFN_UP, 0, stored.shape, "BF16", source)
        importance = random.lognormal(0, 1.5, N_COLS).astype(np.float32)
        kinds = sorted({item.format.name for planned in plans for item in planned.tensors})
        rates = {kind: measure_rate(tensor, kind, importance) for kind in kinds}
        by_role: Counter[str] = Counter()
        for item in model.tensors:
            by_role[item.role.value.split("_")[0]] += math.prod(item.shape)
        total = sum(by_role.values())
        used = total - by_role["expert"] * (1 - LARGEST["num_experts_per_tok"] / LARGEST["num_experts"])
        print(f"{total:,} weights, {used / 1e9:.1f}e9 in use for a token; {len(model.tensors)} tensors")
        print("weights by part: " + ", ".join(f"{part} {n / 1e9:.2f}e9" for part, n in by_role.most_common()))
        print("million weights a second and core: " + ", ".join(f"{k} {rate / 1e6:.0f}" for k, rate in rates.items()))
        print("\n| recipe | bits per weight | read | written | core hours | tasks |\n|---|---:|---:|---:|---:|---:|")
        jobs = [cost(planned, rates) for planned in plans]
        for job in jobs:
            print(
                f"| {job.recipe} | {job.bits_per_weight:.2f} | {job.read_bytes / 1e9:.1f} GB | "
                f"{job.written_bytes / 1e9:.1f} GB | {job.core_seconds / 3600:.2f} | {job.n_tasks:,} |"
            )
        print("\n| recipe | cores | " + " | ".join(f"{n} Gbit/s" for n in GIGABITS) + " |")
        print("|---|---:|" + "---|" * len(GIGABITS))
        for job in jobs:
            for cores in CORES:
                cells = [job.seconds(cores, gigabits) for gigabits in GIGABITS]
                print(f"| {job.recipe} | {cores} | " + " | ".join(f"{duration(s)}, {why}" for s, why in cells) + " |")


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or RECIPES)
