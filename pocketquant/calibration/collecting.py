"""Statistics of a model on texts: of its inputs alone, or of inputs and gradients, which are then joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pocketquant.calibration.statistics import fingerprint, open_statistics
from pocketquant.calibration.statistics_run import collect_statistics
from pocketquant.calibration.statistics_writing import merge_statistics
from pocketquant.files.interrupts import resumable
from pocketquant.files.replacing import hidden_beside
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.texts.calibration import CalibrationSettings, cut_texts

Steps = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Shows progress: called with a label, gives what is called with the windows done and the windows in all."""


@dataclass(frozen=True)
class CollectSettings:
    """How a model is run over texts, for statistics or for an importance matrix.

    Attributes:
        context: tokens in a window.
        chunks: the most windows of each text; None for all, or for 16 that the model writes.
        seed: of a text that the model writes, and of the labels that gradients are taken of.
        resume: go on where an interrupted run was saved beside the output.
        reference_type: the type that a checkpoint is run in: f32 or bf16.
        memory_bytes: for statistics, the bound of the sums in memory; less means more passes.
        curvature: for statistics, gradients too; needs torch and transformers.
        torch_device: where gradients are computed: cpu or cuda.
    """

    context: int = 512
    chunks: int | None = None
    seed: int = 0
    resume: bool = False
    reference_type: str = "f32"
    memory_bytes: int = 2 << 30
    curvature: bool = False
    torch_device: str = "cpu"


@dataclass(frozen=True)
class Collection:
    """One run: the model and the texts, how it is run, and how its progress is shown."""

    gguf: Path
    texts: Sequence[Path | str]
    settings: CollectSettings
    steps: Steps
    threads: int | None = None
    gpu_layers: int = 0

    def write(self, out: Path) -> None:
        """Collects everything, and writes the file.

        Raises:
            SourceError, EvalError: see `statistics_run` and `fisher`.
        """
        if self.settings.curvature:
            self._write_both(out)
        else:
            self._write_inputs(out)

    def _calibration(self) -> CalibrationSettings:
        how = self.settings
        return CalibrationSettings(how.context, how.chunks, self.threads, self.gpu_layers, how.seed)

    def _write_inputs(self, out: Path) -> None:
        how = self.settings
        with self.steps("inputs") as advance:
            collect_statistics(
                self.gguf,
                self.texts,
                out,
                self._calibration(),
                memory_bytes=how.memory_bytes,
                resume=how.resume,
                progress=advance,
            )

    def _write_both(self, out: Path) -> None:
        """Inputs and gradients into files of their own beside `out`, which are then joined."""
        from pocketquant.calibration.fisher import FisherSettings, collect_fisher

        how, model = self.settings, open_gguf(self.gguf)
        inputs, gradients = hidden_beside(out, "inputs"), hidden_beside(out, "gradients")
        windows, texts, _ = cut_texts(self.gguf, self.texts, self._calibration())
        made = open_statistics(inputs) if how.resume and inputs.exists() else None
        if made is None or (made.texts, made.model_sha256) != (texts, fingerprint(model)):
            self._write_inputs(inputs)
        way = (
            f"statistics of the inputs are kept in {inputs}; the same command with --resume goes on with the gradients"
        )
        with resumable(inputs, way), self.steps("gradients") as advance:
            collect_fisher(
                model,
                windows,
                texts,
                gradients,
                FisherSettings(device=how.torch_device, threads=self.threads, seed=how.seed),
                resume=how.resume,
                progress=advance,
            )
        merge_statistics([inputs, gradients], out)
        inputs.unlink()
        gradients.unlink()
