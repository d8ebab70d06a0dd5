"""Statistics of a mixture of experts, rounding by them, and the file in llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, moe_config
from moe_checkpoint import golden_weights

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.calibration.statistics import Statistics, open_statistics
from pocketquant.demo import text_path
from pocketquant.formats import F32Array
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.model import Tensor
from pocketquant.quant.rounding import factor_hessian, losses
from pocketquant.texts.calibration import CalibrationSettings

pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

from pocketquant.calibration.statistics_run import collect_statistics
from pocketquant.eval import compare

COMMAND = str(Path(sys.executable).with_name("pocketquant"))
N_EXPERT, UNSEEN = moe_config()["num_experts"], 4


@dataclass(frozen=True)
class Made:
    """Files of one mixture of experts: in F32, in Q4_K_M by the plain kernels, and rounded by statistics."""

    checkpoint: Path
    original: Path
    plain: Path
    rounded: Path
    statistics: Statistics

    def tensors(self, path: Path) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in open_gguf(path).tensors}

    def errors(self, path: Path, name: str, rows: slice) -> F32Array:
        return self.rows(path, name, rows) - self.rows(self.original, name, rows)

    def rows(self, path: Path, name: str, rows: slice) -> F32Array:
        return self.tensors(path)[name].rows(rows.start, rows.stop)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("moe")
    weights = golden_weights()
    router = weights["model.layers.0.mlp.gate.weight"]
    router[1], router[3], router[5] = -router[0], -router[2], 0.1 * router[0]
    router[UNSEEN] = 0.0  # two of the others are always above it
    checkpoint = make_checkpoint(folder / "c", weights=weights, num_experts=N_EXPERT)
    model = open_model(checkpoint)
    write(plan(model, open_recipe("f32")), folder / "f32.gguf")
    write(plan(model, open_recipe("q4_k_m")), folder / "plain.gguf")
    collect_statistics(
        folder / "f32.gguf", [text_path("calibration")], folder / "stats", CalibrationSettings(128, 6, threads=1)
    )
    quantize(checkpoint, folder / "stats", "--out", folder / "rounded.gguf", "--quiet")
    files = (folder / f"{name}.gguf" for name in ("f32", "plain", "rounded"))
    return Made(checkpoint, *files, open_statistics(folder / "stats"))


def quantize(checkpoint: Path, stats: Path, *arguments: object) -> str:
    command = [COMMAND, "quantize", checkpoint, "--recipe", "q4_k_m", "--stats", stats, *arguments]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("kind", ["gate", "up", "down"])
@pytest.mark.parametrize("layer", [0, 3])
def test_each_expert_loses_less_by_its_own_moment(made: Made, layer: int, kind: str) -> None:
    name = f"blk.{layer}.ffn_{kind}_exps.weight"
    _, n_rows, _ = made.tensors(made.original)[name].shape
    for expert in range(N_EXPERT):
        rows = slice(expert * n_rows, (expert + 1) * n_rows)
        moment = made.statistics.input(name, expert)
        if layer == 0 and expert == UNSEEN:
            assert moment is None
            assert np.array_equal(made.rows(made.rounded, name, rows), made.rows(made.plain, name, rows))
            continue
        assert moment is not None
        ours, plain = (
            losses(made.errors(path, name, rows), factor_hessian(moment)).sum() for path in (made.rounded, made.plain)
        )
        assert ours < 0.6 * plain, f"expert {expert}"
        other = made.statistics.input(name, (expert + 1) % 3)  # the gain is not one of everybody's moments
        if other is not None and expert != (expert + 1) % 3:
            theirs, also = (
                losses(made.errors(path, name, rows), factor_hessian(other)).sum()
                for path in (made.rounded, made.plain)
            )
            assert ours / plain < 0.9 * theirs / also, f"expert {expert}"


def test_the_plan_names_experts_without_tokens(made: Made) -> None:
    described = json.loads(quantize(made.checkpoint, made.statistics.path, "--dry-run", "--json"))
    reasons = {tensor["name"]: tensor["reason"] for tensor in described["tensors"]}
    for kind in ("gate", "up", "down"):
        said = "rounded by its inputs, but no token was routed to 1 of its experts, which keep the plain kernel: 4"
        assert reasons[f"blk.0.ffn_{kind}_exps.weight"].endswith(said)
        assert reasons[f"blk.1.ffn_{kind}_exps.weight"].endswith("; rounded by its inputs")


def test_an_output_head_of_its_own_is_rounded_by_groups(made: Made) -> None:
    head = made.statistics.head()
    assert head is not None
    everything = slice(0, len(head.row_group))
    ours, plain = (made.errors(path, "output.weight", everything) for path in (made.rounded, made.plain))
    for group in range(head.n_group):
        factored, rows = factor_hessian(head.hessian(group)), head.row_group == group
        assert losses(ours[rows], factored).sum() < 0.9 * losses(plain[rows], factored).sum()
    # without gradients nothing is known of the embedding
    embedding = [made.rows(path, "token_embd.weight", everything) for path in (made.rounded, made.plain)]
    assert np.array_equal(*embedding)


def test_the_file_runs_and_is_nearer_to_the_original(made: Made) -> None:
    rounded, plain = (
        compare(path, made.original, text_path("evaluation"), context=128, chunks=6, threads=1).to_json()["metrics"]
        for path in (made.rounded, made.plain)
    )
    assert 0 < rounded["kld"]["mean"] < plain["kld"]["mean"]
