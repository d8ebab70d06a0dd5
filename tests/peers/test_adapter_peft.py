"""Adapters that PEFT itself made and merged, and llama.cpp's own converter for adapters."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_maker import make_adapter, rows_of
from checkpoint_maker import make_checkpoint
from moe_checkpoint import golden_checkpoint

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.convert.adapter import open_adapter
from pocketquant.convert.adapter_gguf import plan_adapter
from pocketquant.demo import checkpoint_dir
from pocketquant.files.reading import read_at
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_header
from pocketquant.model import Role

DELTA = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
ALL = [*DELTA, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ALL},
    "all-linear": {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ALL},
    "patterns": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ALL,
        "rank_pattern": {"in_proj_qkv": 5, r"layers\.2\.mlp\.up_proj": 2},
        "alpha_pattern": {"out_proj": 3, r"^model\.layers\.0\.mlp\.down_proj": 20, "down_proj": 11},
    },
    "embedding and head": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "in_proj_z"]},
    "fused experts": {
        "r": 3,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "in_proj_qkv"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        "rank_pattern": {"mlp.experts.down_proj": 2},
        "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 5},
    },
    "one of the experts' two": {"r": 4, "target_modules": [], "target_parameters": ["experts.down_proj"]},
    "head trained whole": {"r": 4, "target_modules": ["in_proj_b"], "modules_to_save": ["lm_head"]},
    "norms trained whole": {"r": 4, "target_modules": ["in_proj_b"], "modules_to_save": ["norm"]},
    "DeltaNet trained whole": {"r": 4, "target_modules": ["up_proj"], "modules_to_save": ["linear_attn"]},
}
PARAMETERS = (Role.EMBED, Role.ROUTER, Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


@pytest.fixture(scope="module")
def peft_cases(oracle_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Case -> base checkpoint, and folder of what PEFT made; one process makes all, as starting it takes longest."""
    if subprocess.run([oracle_python, "-c", "import peft"], capture_output=True).returncode:
        pytest.skip("no peft in .venv-peers; pip install peft there")
    folder = tmp_path_factory.mktemp("peft")
    untied = make_checkpoint(folder / "untied", tie_word_embeddings=False)
    mixture = golden_checkpoint(folder / "mixture")
    cases = {}
    for case, settings in CASES.items():
        has_head = any("lm_head" in settings.get(key, ()) for key in ("target_modules", "modules_to_save"))
        base = mixture if settings.get("target_parameters") else untied if has_head else checkpoint_dir()
        cases[case] = (base, folder / case.replace(" ", "-"))
    listed = [[str(base), str(target), CASES[case]] for case, (base, target) in cases.items()]
    (folder / "cases.json").write_text(json.dumps(listed))
    command = [oracle_python, Path(__file__).with_name("peft_merge.py"), folder / "cases.json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return cases


@pytest.mark.parametrize("case", CASES)
def test_breaks_today_08_lora_adapters_merge_as_peft_merges_them(
    case: str, tmp_path: Path, peft_cases: dict[str, tuple[Path, Path]]
) -> None:
    checkpoint, folder = peft_cases[case]
    base, ours = open_model(checkpoint), open_model(checkpoint, adapter=folder / "lora")
    write(plan(ours, open_recipe("bf16")), tmp_path / "ours.gguf")
    rounded, in_f32, in_bf16 = (
        open_gguf(tmp_path / "ours.gguf"),
        open_model(folder / "merged-f32"),
        open_model(folder / "merged-bf16"),
    )
    n_changed = n_weights = n_different = 0
    for tensor in in_f32.tensors:
        before, expected, found = (rows_of(model, tensor.name) for model in (base, in_f32, ours))
        change = np.abs(expected - before).max()
        n_changed += change > 0
        # f32: PEFT sums in another order and rounds the change before it adds it
        assert np.abs(found - expected).max() <= 2e-6 * max(change, np.abs(before).max()), tensor.name
        if change:
            theirs, mine = rows_of(in_bf16, tensor.name), rows_of(rounded, tensor.name)
            allowed = np.maximum(ulp(theirs), ulp(mine))
            if tensor.role in PARAMETERS:  # where PEFT rounds the change to bf16 before it adds it
                allowed = allowed + ulp(expected - before) / 2
            elif not tensor.keep_f32:  # those were rounded in PEFT's model alone
                n_weights, n_different = n_weights + theirs.size, n_different + int((theirs != mine).sum())
            # where base and change cancel, f32's rounding of either is more than an ulp of what is left
            allowed = np.maximum(allowed, 2e-6 * np.abs(before).max())
            assert (np.abs(theirs - mine) <= allowed).all(), tensor.name
    adapter = open_adapter(folder / "lora")
    two_tensors = sum(change.module.endswith("gate_up_proj") for change in adapter.changes)
    assert n_changed == len(adapter.changes) + two_tensors + len(adapter.trained_weights)
    assert n_different <= 1e-4 * n_weights


def ulp(values: np.ndarray) -> np.ndarray:
    """Of bf16, which has 8 bits where f32 has 24."""
    return np.spacing(np.abs(values)) * 2.0**16


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_where_no_head_moves_the_gguf_is_llama_cpps(kind: str, tmp_path: Path, oracle_python: Path) -> None:
    """As many value heads as key heads: every order is as it was, and llama.cpp's converter is right too."""
    checkpoint = make_checkpoint(tmp_path / "base", linear_num_value_heads=2, tie_word_embeddings=False)
    folder = make_adapter(tmp_path / "lora", checkpoint, more=("lm_head", "model.embed_tokens"), ranks={"o_proj": 2})
    run = convert_theirs(oracle_python, checkpoint, folder, tmp_path / "theirs.gguf", kind)
    assert run.returncode == 0, run.stderr[-2000:]
    write(plan_adapter(open_adapter(folder), open_model(checkpoint), kind), tmp_path / "ours.gguf")
    ours, theirs = (read_header(tmp_path / f"{who}.gguf") for who in ("ours", "theirs"))
    mine, others = ({tensor.name: tensor for tensor in header.tensors} for header in (ours, theirs))
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        other = others[name]
        assert (tensor.shape, tensor.format) == (other.shape, other.format), name
        data = (
            read_at(tmp_path / f"{who}.gguf", t.offset, t.nbytes) for who, t in (("ours", tensor), ("theirs", other))
        )
        assert np.array_equal(*data), name
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.metadata[key] == theirs.metadata[key], key


def convert_theirs(python: Path, base: Path, adapter: Path, out: Path, kind: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("llama_convert_lora.py")
    return subprocess.run([python, script, base, adapter, out, kind], capture_output=True, text=True)
