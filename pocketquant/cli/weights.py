"""`eval --weights` alone, and `weights`: how far each tensor is from full precision, without inference."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pocketquant.cli.inspect import open_to_look
from pocketquant.cli.options import ReferenceSource, Source, Talk
from pocketquant.cli.screen import print_json, print_table


def weights(source: Source, reference: ReferenceSource, talk: Talk) -> None:
    """Measure each tensor's error, as `eval --weights`."""
    from pocketquant.eval import weight_errors

    with talk.steps(Path(source).name, "tensors") as advance:
        errors = weight_errors(open_to_look(source), open_to_look(reference), progress=advance)
    if talk.json:
        print_json({"tensors": [asdict(error) | {"role": error.role.value} for error in errors]})
        return
    print_table(
        ["tensor", "role", "type", "SNR (dB)", "cosine", "relative RMSE", "largest error"],
        [
            [
                error.name,
                error.role.value,
                error.format,
                "exact" if error.snr_db is None else f"{error.snr_db:.2f}",
                f"{error.cosine:.6f}",
                "" if error.relative_rmse is None else f"{error.relative_rmse:.5f}",
                f"{error.max_abs_error:.3g}",
            ]
            for error in errors
        ],
    )
