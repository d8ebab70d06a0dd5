"""Statistics from running a GGUF over texts: as many passes as its sums need to stay within a bound of memory.

A pass runs the whole text and sums the inputs of some layers, or of some of the output head's groups; the graph ends
behind the last layer that is wanted. What a pass has summed goes into the unfinished file at once, so disk is needed
only once; unfinished sums of a pass are saved from time to time, and by an interrupt (`saved_sums`). Interrupted and
taken up again, or made in one pass or in many, the file is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketquant.calibration.hessian import MAX_GROUPS, HeadSums, MomentSums, Share, group_rows
from pocketquant.calibration.imatrix import SELF, SELF_CHUNKS, cut_windows, read_text, sample_windows
from pocketquant.calibration.saved_sums import SavedSums
from pocketquant.calibration.statistics import COUNT, HEAD_ROUNDING, INPUT, ROUNDING, Text, fingerprint
from pocketquant.calibration.statistics_writing import MOMENTS, About, Layout, Piece, lay_out, triangles
from pocketquant.errors import ArchitectureError, EvalError
from pocketquant.files.reading import digest_file, states_of
from pocketquant.files.unchanged import check_unchanged
from pocketquant.gguf_file.opening import open_unfused
from pocketquant.llama.observing import Observer
from pocketquant.llama.runtime import default_rows, open_runtime
from pocketquant.model import Model, Role, Tensor

Progress = Callable[[int, int], None]
"""Called with windows done and windows in all, those of every pass."""

_SAME_INPUT = (
    (Role.DELTA_QKV, Role.DELTA_GATE, Role.DELTA_ALPHA, Role.DELTA_BETA),
    (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V),
    (Role.FFN_GATE, Role.FFN_UP),
    (Role.SHARED_ROUTER, Role.SHARED_GATE, Role.SHARED_UP),
    (Role.EXPERT_GATE, Role.EXPERT_UP),
)
_BATCH = 512


@dataclass(frozen=True)
class Pass:
    """What one run over the text sums: shares of inputs, and perhaps groups of the head."""

    shares: tuple[Share, ...]
    last_layer: int | None
    head: Share | None

    @property
    def sum_bytes(self) -> int:
        parts = (*self.shares, *([self.head] if self.head else []))
        # one more matrix: a window's product, before it is added
        return sum(part.sum_bytes for part in parts) + max(4 * part.k**2 for part in parts)


@dataclass(frozen=True)
class Calibration:
    """What will be summed, decided from names and shapes alone.

    Attributes:
        shared: tensor -> the tensor under whose name their common input stands.
        inputs: that tensor -> (n_matrix, k).
        passes: runs over the text.
        n_group: most groups of the head's rows.
    """

    shared: Mapping[str, str]
    inputs: Mapping[str, tuple[int, int]]
    passes: tuple[Pass, ...]
    n_embd: int
    n_vocab: int
    n_group: int

    @property
    def file_bytes(self) -> int:
        """About what the file will take."""
        sides = [*self.inputs.values(), (self.n_group, self.n_embd)]
        return sum(2 * n * k * (k + 1) for n, k in sides) + 20 * self.n_vocab


def plan_calibration(model: Model, *, memory_bytes: int = 2 << 30, n_group: int = MAX_GROUPS) -> Calibration:
    """Shares a model's inputs out to passes whose sums fit in `memory_bytes`.

    Raises:
        EvalError: a single matrix does not fit.
    """
    wanted = [t for t in model.tensors if _has_inputs(t, model.sizes["n_layer"])]
    shared: dict[str, str] = {}
    first_of: dict[tuple[int | None, int], str] = {}
    for tensor in wanted:
        group = next((i for i, roles in enumerate(_SAME_INPUT) if tensor.role in roles), None)
        shared[tensor.name] = tensor.name if group is None else first_of.setdefault((tensor.layer, group), tensor.name)
    by_name = {tensor.name: tensor for tensor in wanted}
    inputs = {key: (by_name[key].n_matrix, by_name[key].n_cols) for key in dict.fromkeys(shared.values())}
    n_embd, n_vocab = model.sizes["n_embd"], next(t.n_rows for t in model.tensors if t.role is Role.EMBED)
    largest = max([4 * k * k for _, k in inputs.values()] + [4 * n_embd**2])
    if 2 * largest > memory_bytes:
        raise EvalError(
            f"{memory_bytes} bytes of memory are too few for the largest matrix; give {2 * largest} or more"
        )
    layers = {key: by_name[key].layer or 0 for key in inputs}
    sides = [(key, n, k) for key, (n, k) in sorted(inputs.items(), key=lambda item: layers[item[0]])]
    passes: list[list[Share]] = [[]]
    room = memory_bytes - largest
    for key, n_matrix, k in [*sides, (MOMENTS, n_group, n_embd)]:
        first = 0
        if key == MOMENTS and default_rows(n_vocab) < _BATCH:
            # its logits come in small batches, which would make the sums of the layers slower and round them otherwise
            passes.append([])
            room = memory_bytes - largest
        while first < n_matrix:
            stop = min(n_matrix, first + room // (4 * k * k))
            if stop > first:
                passes[-1].append(Share(key, k, first, stop))
                room -= passes[-1][-1].sum_bytes
                first = stop
            if first < n_matrix:
                passes.append([])
                room = memory_bytes - largest
    return Calibration(
        shared, inputs, tuple(_as_pass(shares, layers) for shares in passes if shares), n_embd, n_vocab, n_group
    )


def _as_pass(shares: Sequence[Share], layers: Mapping[str, int]) -> Pass:
    head = next((share for share in shares if share.key == MOMENTS), None)
    blocks = tuple(share for share in shares if share.key != MOMENTS)
    return Pass(blocks, None if head else max(layers[share.key] for share in blocks), head)


def _has_inputs(tensor: Tensor, n_layer: int) -> bool:
    # blocks behind the last layer predict further tokens; they are not run over a text here
    return tensor.layer is not None and tensor.layer < n_layer and len(tensor.shape) > 1 and not tensor.keep_f32


def calibrate(
    gguf: str | Path,
    texts: Sequence[str | Path],
    out: Path,
    *,
    context: int = 512,
    chunks: int | None = None,
    memory_bytes: int = 2 << 30,
    threads: int | None = None,
    gpu_layers: int = 0,
    seed: int = 0,
    resume: bool = False,
    save_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Calibration:
    """Runs a model over texts and writes the second moments of its inputs.

    Args:
        gguf: the model, in F32 or BF16.
        texts: paths of UTF-8 texts, or `SELF` to sample one from the model.
        out: the statistics file; unfinished work lies beside it as `.NAME.unfinished` and `.NAME.state`.
        context: tokens in a window.
        chunks: most windows to take of each text; None for the whole text, or `SELF_CHUNKS` sampled ones.
        memory_bytes: bound of the sums in memory; the model itself comes on top.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers computed on a GPU, -1 for all.
        seed: of the sampling.
        resume: go on where an interrupted run was saved.
        save_seconds: least time between two savings.
        progress: told after each window.

    Raises:
        SourceError: model or text was changed meanwhile.
        EvalError: model or text cannot be read, a text is too short, an input is not finite, the unfinished work is of
            another run, memory does not suffice, or the installed llama-cpp-python cannot be looked into.
    """
    if context < 16 or (chunks is not None and chunks < 1):
        raise EvalError(f"context {context}, chunks {chunks}: use windows of at least 16 tokens, and at least one")
    for text in texts:
        if str(text) != SELF:
            read_text(text)  # before a model is loaded
    files = states_of(gguf, *(text for text in texts if str(text) != SELF))
    model = open_unfused(gguf)
    if not any(tensor.role is Role.EMBED for tensor in model.tensors):
        raise ArchitectureError(f"{gguf}: holds no embedding; give the whole model")
    calibration = plan_calibration(model, memory_bytes=memory_bytes)
    windows, about_texts, kernels = _cut(gguf, texts, context, chunks, threads, gpu_layers, seed)
    about = About(windows.size, fingerprint(model), about_texts, calibration.shared, kernels)
    frequency = np.bincount(windows.reshape(-1), minlength=calibration.n_vocab)
    row_group = group_rows(frequency, calibration.n_group)
    n_group = int(row_group.max()) + 1
    layout = _lay_out(calibration, about, n_group)
    run = {
        "model": digest_file(Path(gguf)),
        "header": hashlib.sha256(layout.header).hexdigest(),
        "memory": memory_bytes,
        "state": 3,
    }
    work = SavedSums(out, run, save_seconds)
    with work.begun(layout, resume):
        done_before = work.first_pass * len(windows) + work.first_window
        if progress is not None:
            progress(done_before, len(calibration.passes) * len(windows))
        for number in range(work.first_pass, len(calibration.passes)):
            sums = _sums_of(calibration.passes[number], row_group, n_group)
            first = work.first_window if number == work.first_pass else 0
            work.begin_pass(sums, number, first)
            sums.begin_at(first * context)
            observer = Observer(sums)
            is_head = sums.head is not None
            with open_runtime(
                gguf,
                context=context,
                threads=threads,
                gpu_layers=gpu_layers,
                # no logits are computed, so room for them costs nothing
                rows=None if is_head else min(context, _BATCH),
                observe=observer.see,
            ) as runtime:
                for i in range(first, len(windows)):
                    for _, logits in runtime.logits(windows[i].tolist()):
                        if sums.head is not None:
                            sums.head.add_logits(logits)
                    if progress is not None:
                        progress(number * len(windows) + i + 1, len(calibration.passes) * len(windows))
                    work.reached(i + 1, is_last=i + 1 == len(windows))
            sums.check_tokens(windows.size)
            sums.free_room()
            layout.put(work.unfinished, _finished(sums, frequency, is_last=number + 1 == len(calibration.passes)))
            work.close_pass()
        check_unchanged(files)
        work.finish()
    return calibration


def cut_texts(
    gguf: str | Path,
    texts: Sequence[str | Path],
    context: int,
    chunks: int | None,
    threads: int | None,
    gpu_layers: int,
    seed: int,
) -> tuple[npt.NDArray[np.int32], tuple[Text, ...]]:
    """Windows i32[n_window, context] of all texts, one after the other, and what they are; see `calibrate`."""
    return _cut(gguf, texts, context, chunks, threads, gpu_layers, seed)[:2]


def _cut(
    gguf: str | Path,
    texts: Sequence[str | Path],
    context: int,
    chunks: int | None,
    threads: int | None,
    gpu_layers: int,
    seed: int,
) -> tuple[npt.NDArray[np.int32], tuple[Text, ...], Mapping[str, str]]:
    """The same, and the versions of what will compute; passes differ in their batches, which none of these is."""
    cut = []
    with open_runtime(gguf, context=context, threads=threads, gpu_layers=gpu_layers) as runtime:
        for text in texts:
            if str(text) == SELF:
                cut.append(sample_windows(gguf, context, chunks or SELF_CHUNKS, threads, gpu_layers, seed))
            else:
                cut.append(cut_windows(text, runtime, context, chunks))
    about = tuple(Text(part.name, part.windows.size, part.sha256) for part in cut)
    if len({text.sha256 for text in about}) < len(about):
        raise EvalError("the same text was given twice; it would count twice")
    kernels = {key: value for key, value in runtime.versions.items() if key != "llama_cpp_batch"}
    return np.concatenate([part.windows for part in cut]), about, kernels


def _lay_out(calibration: Calibration, about: About, n_group: int) -> Layout:
    n_vocab = calibration.n_vocab
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        "head/row_group": ("I32", (n_vocab,)),
        "head/variance": ("F64", (n_vocab,)),
        "head/frequency": ("F64", (n_vocab,)),
        MOMENTS + COUNT: ("I64", (n_group,)),
        MOMENTS: triangles(n_group, calibration.n_embd),
        HEAD_ROUNDING: ("F32", (1, 2 * calibration.n_embd)),
    }
    for key, (n_matrix, k) in calibration.inputs.items():
        arrays[key + INPUT + COUNT] = ("I64", (n_matrix,))
        arrays[key + INPUT] = triangles(n_matrix, k)
        arrays[key + ROUNDING] = ("F32", (n_matrix, 2 * k))
    return lay_out(about, arrays)


def _sums_of(run: Pass, row_group: npt.NDArray[np.int32], n_group: int) -> MomentSums:
    head = None
    if run.head is not None:
        share = Share(run.head.key, run.head.k, min(run.head.first, n_group), min(run.head.stop, n_group))
        sums = np.zeros((share.stop - share.first, share.k, share.k), np.float32)
        counts = np.zeros(2 + len(sums), np.int64)
        head = HeadSums(row_group, share, sums, np.zeros(len(row_group)), np.zeros((2, share.k)), counts)
    return MomentSums({share.key: share for share in run.shares}, run.last_layer, head)


def _finished(sums: MomentSums, frequency: npt.NDArray[np.int64], *, is_last: bool) -> Iterator[Piece]:
    """Means, and the counts of whole arrays: those of experts that came in parts are put part by part.

    The sums stay as they are, for an interrupt to save.
    """
    for key, share in sums.shares.items():
        for i, count in enumerate(sums.counts[key]):
            yield key + INPUT + COUNT, share.first + i, np.array(count)
            yield key + INPUT, share.first + i, sums.sums[key][i] / np.float32(max(int(count), 1))
            yield key + ROUNDING, share.first + i, sums.rounding[key][i].reshape(-1) / max(int(count), 1)
    if sums.head is None:
        return
    head, tokens = sums.head, int(sums.head.tokens[0])
    sizes = np.bincount(head.row_group)
    for i in range(head.share.stop - head.share.first):
        group = head.share.first + i
        yield MOMENTS + COUNT, group, np.array(tokens)
        yield MOMENTS, group, head.sums[i] / np.float32(tokens * sizes[group])
    if is_last:
        yield "head/row_group", None, head.row_group
        yield "head/variance", None, head.variance / tokens
        yield "head/frequency", None, frequency / frequency.sum()
        yield HEAD_ROUNDING, 0, head.rounding.reshape(-1) / tokens
