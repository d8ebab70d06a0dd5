"""Runs in the interpreter with torch: tunes a file, and finds derivatives by differences.

    python tuning_run.py ROOT FILE REFERENCE FOLDER WATCHED...

FOLDER has `windows.npy` and `more.npy`, and gets `tuned.gguf`, `again.gguf` (the same once more), `scales.gguf` (codes
left alone), `tuned.json`, and `derivatives.json`: tensor and field -> the derivative of the divergence as all its
scales grow, by gradients and by central differences, of tensors whose names begin with one of WATCHED.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import numpy as np

from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_header
from pocketquant.texts.corpus import TextRecord
from pocketquant.tuning import tune as tuning

STEP = 2.0**-7


def differences(
    file: Path, reference: Path, windows: np.ndarray, folder: Path, watched: tuple[str, ...]
) -> dict[str, tuple[float, float]]:
    model, part = open_gguf(reference), np.arange(2)
    scales = tuning._read_scales(file, read_header(file), model)
    setting = tuning.set_up(model, "cpu", 1)
    hidden = tuning.run_reference(setting, windows[:2], [part], folder, lambda: None)
    tuner = tuning.Tuner(setting, open_gguf(file), scales, windows[:2], hidden)
    by_tensor = {name: scales[name].scale_gradients(gradient) for name, gradient in tuner.gradients(part)}
    gradients = {f"{name} {field}": float(g.sum()) for name, folded in by_tensor.items() for field, g in folded.items()}
    found = {}
    for name, each in scales.items():
        if not name.startswith(watched):
            continue
        for field in each.fields:
            sides = []
            for side in (STEP, -STEP):
                each.changes[field][:] = side
                sides.append(tuner.divergence([part], lambda: None))
            each.changes[field][:] = 0
            found[f"{name} {field}"] = (gradients[f"{name} {field}"], (sides[0] - sides[1]) / (2 * STEP))
    return found


def main(file: Path, reference: Path, folder: Path, watched: tuple[str, ...]) -> None:
    windows, more = np.load(folder / "windows.npy"), np.load(folder / "more.npy")
    texts = (TextRecord("text.txt", windows.size, ""),)

    def tune(out: Path, sampled: np.ndarray | None = None, **settings: float) -> tuning.Tuned:
        tokens = tuning.TuningWindows(windows, texts, sampled)
        return tuning.tune_file(file, open_gguf(reference), tokens, out, tuning.TuneSettings(threads=1, **settings))

    for name in ("tuned", "again"):
        made = tune(folder / f"{name}.gguf", more, epochs=1, rate=2e-3, code_rate=4e-3)
    tune(folder / "scales.gguf", epochs=0.5, code_rate=0)
    (folder / "tuned.json").write_text(json.dumps(asdict(made)))
    (folder / "derivatives.json").write_text(json.dumps(differences(file, reference, windows, folder, watched)))
    refused = {}
    for kind, given, base in (("tuned", folder / "tuned.gguf", reference), ("plain", reference, reference)):
        try:
            tuning.check_file(given, open_gguf(base))
        except Exception as error:
            refused[kind] = str(error)
    worse = folder / "worse.gguf"
    try:
        tune(worse, epochs=0.2, rate=0.3)
    except Exception as error:
        refused["worse"] = f"{error} {worse.exists()}"
    (folder / "refused.json").write_text(json.dumps(refused))


if __name__ == "__main__":
    main(*map(Path, sys.argv[2:5]), tuple(sys.argv[5:]))
