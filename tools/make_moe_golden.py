"""Writes tests/golden/moe_logits.npz: what transformers computes in f32 for the mixture-of-experts test checkpoint.

    python tools/make_moe_golden.py [PYTHON]     PYTHON has torch and transformers; .venv-peers/bin/python by default

    ids      i64[64]         tokens, from position 0
    logits   f32[64, 320]
    tokens   i64[4, 6]       how many of the tokens each block's router sent to each expert; none is 0
    sha256   str             of the checkpoint's model.safetensors
Run it only when `tests/moe_checkpoint.py` changes.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from moe_checkpoint import golden_checkpoint, golden_ids  # noqa: E402


def main() -> None:
    python = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / ".venv-peers/bin/python")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = golden_checkpoint(Path(folder) / "Tiny-MoE")
        np.save(Path(folder) / "ids.npy", golden_ids())
        script = ROOT / "tests/peers/transformers_logits.py"
        subprocess.run([python, script, checkpoint, f"{folder}/ids.npy", f"{folder}/out.npz"], check=True)
        computed = np.load(f"{folder}/out.npz")
        digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    if not computed["tokens"].all():
        raise SystemExit(f"an expert that no token reaches is not tested: {computed['tokens'].tolist()}")
    path = ROOT / "tests/golden/moe_logits.npz"
    np.savez_compressed(path, ids=golden_ids(), **computed, sha256=np.array(digest))
    print(f"{path.name}: {path.stat().st_size:,} bytes, tokens by expert {computed['tokens'].tolist()}")


if __name__ == "__main__":
    main()
