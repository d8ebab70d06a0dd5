"""References: full precision to judge by, live or kept in a pack.

What stands behind `--reference` is a GGUF, which runs beside the model; a checkpoint folder, which torch runs
(`torch_reference`); or a pack, made once by `make_reference`. A pack holds the reference's final hidden states, from
which its output matrix makes the logits again, or only its most likely tokens. It says how far it is from the live
reference (`Floor`), and answers only for the tokens that it was made from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.eval.packs.kept_rows import StateKeeper, TopKeeper, fitting_codings
from pocketquant.eval.packs.pack import I32Array, Pack, PackHeader, PackWriter, TextIdentity, is_pack, read_pack
from pocketquant.eval.packs.replay import open_pack
from pocketquant.eval.packs.states import Head, StateCatcher, row_bytes
from pocketquant.eval.packs.top_k import check_top, row_dtype
from pocketquant.eval.packs.unfinished import UnfinishedPack
from pocketquant.extras import list_versions
from pocketquant.files.reading import states_of
from pocketquant.files.unchanged import check_unchanged
from pocketquant.formats import F32Array
from pocketquant.gguf_file.identity import FileIdentity, identify, identify_model
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.llama.runtime import Runtime, open_runtime
from pocketquant.model import Model, Role, Tensor
from pocketquant.texts.conversations import render_chat
from pocketquant.texts.corpus import Corpus, Text, check_size, cut_corpus, read_text

MAX_FLOOR = 1e-6
"""Mean divergence, in nats, from which on a pack is no stand-in for its reference and is refused."""

_MEASURED = 1024
"""Positions that the floor is measured at, about, spread over all windows."""

Progress = Callable[[int, int], None]
Groups = Iterator[tuple[int, F32Array | None, F32Array]]


class ReferenceRun(Protocol):
    """A reference that runs.

    Attributes:
        runtime: tokenizes, and says what it is.
        head: its output matrix.
        identity: the reference, by content.
        sizes: dimension words -> numbers that the judged model must share.
        tells_head: whether the matrix can be found again without a copy in the pack.
    """

    @property
    def runtime(self) -> Runtime: ...
    @property
    def head(self) -> Head: ...
    @property
    def identity(self) -> FileIdentity: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def tells_head(self) -> bool: ...

    def groups(self, tokens: Sequence[int], first: int, *, states: bool) -> Groups:
        """(position of the first row, states f32[n, n_embd] if asked for, logits f32[n, n_vocab]) from `first` on."""
        ...


@dataclass(frozen=True)
class ReferencePlan:
    """What a pack will cost.

    Attributes:
        positions: scored positions.
        pack_bytes: size of the pack without its header, at most.
        head_bytes: of that, the copy of the output matrix.
        base_bytes: size of the file that llama-perplexity would write for the same windows.
    """

    windows: int
    positions: int
    pack_bytes: int
    head_bytes: int
    base_bytes: int


def plan_reference(
    model: str | Path,
    texts: Sequence[Text],
    *,
    context: int = 512,
    chunks: int | None = None,
    positions: bool = False,
    top: int = 0,
    with_head: bool = False,
    threads: int | None = None,
) -> ReferencePlan:
    """Tokenizes the texts and says what a pack would take; arguments and errors are those of `make_reference`."""
    with _open_run(model, context, threads, 0, top, texts, chunks) as run:
        cuts = _cut(run.runtime, texts, model, context, chunks, positions)
        return _plan(run, cuts, top, with_head)


def make_reference(
    model: str | Path,
    texts: Sequence[Text],
    out: str | Path,
    *,
    context: int = 512,
    chunks: int | None = None,
    positions: bool = False,
    top: int = 0,
    with_head: bool = False,
    threads: int | None = None,
    gpu_layers: int = 0,
    resume: bool = False,
    save_seconds: float = 60.0,
    is_result: bool = True,
    progress: Progress | None = None,
) -> Pack:
    """Runs a reference over texts and keeps what later comparisons need.

    Args:
        model: a GGUF in full precision, or the folder of a checkpoint.
        texts: the texts, as for `compare`.
        out: the pack to write; unfinished work lies beside it as `.NAME.unfinished` and `.NAME.state`.
        context: tokens in a window.
        chunks: most windows of each text; None for all.
        positions: keep the first half of each window, too.
        top: keep only so many of the most likely tokens per position; 0 for hidden states.
        with_head: put a copy of the output matrix into the pack. One made from a checkpoint always has it.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers computed on a GPU, -1 for all.
        resume: go on where an interrupted run was saved; the pack is the same to the last byte.
        save_seconds: least time between two savings of how far it is.
        is_result: as in `put_in_place`.
        progress: told after each window.

    Raises:
        EvalError: something cannot be read or run, the unfinished work is of another run, or what the pack gives back
            is further from the reference than `MAX_FLOOR`.
        OutputError: the pack cannot be written; what stood there before stays.
        SourceError: model or text was changed meanwhile.
    """
    files = states_of(model, *(text.path for text in texts))
    with _open_run(model, context, threads, gpu_layers, top, texts, chunks) as run:
        cuts = _cut(run.runtime, texts, model, context, chunks, positions)
        with_head = not top and (with_head or not run.tells_head)
        keeper = TopKeeper(run.runtime.n_vocab, top) if top else StateKeeper(run.head)
        windows = np.concatenate([corpus.windows for corpus in cuts])
        first = cuts[0].first_scored
        stride = max(windows.shape[0] * cuts[0].scored_per_window // _MEASURED, 1)
        versions = list_versions() | dict(run.runtime.versions)
        work = UnfinishedPack(Path(out), _settings(run, windows, first, top, with_head, versions), save_seconds)
        with work.begun(resume=resume):
            with PackWriter(work.path) as writer:
                writer.add("tokens", windows.astype("<i4").view(np.uint8))
                if work.windows:
                    keeper.take_up(work.kept)
                work.take_up(writer)
                if progress is not None:
                    progress(work.windows, len(windows))
                for done, window in enumerate(windows[work.windows :], start=work.windows + 1):
                    groups = run.groups(window[:-1].tolist(), first, states=not top)
                    for start, states, logits in groups:
                        after = window[start + 1 : start + 1 + len(logits)]
                        writer.add("rows", keeper.keep(states, logits, after, is_measured=(done - 1) % stride == 0))
                    if progress is not None:
                        progress(done, len(windows))
                    work.reached(done, keeper.state(), is_last=done == len(windows))
                if with_head:
                    for piece in run.head.stored_bytes():
                        writer.add("head", piece)
                floor = keeper.floor()
                if floor.kld_mean >= MAX_FLOOR:
                    raise EvalError(
                        f"{model}: the pack would be {floor.kld_mean:g} nats from the reference itself, more than "
                        f"{MAX_FLOOR:g}; make it from a file in f32, bf16, f16 or q8_0, or run both files side by side"
                    )
                header = PackHeader(
                    kind="top" if top else "states",
                    model=run.identity,
                    sizes=dict(run.sizes),
                    vocabulary=run.runtime.vocabulary,
                    n_vocab=run.runtime.n_vocab,
                    bos=run.runtime.bos,
                    context=context,
                    first_scored=first,
                    texts=tuple(
                        TextIdentity(
                            **asdict(identify(text.path)), windows=len(cut.windows), text_tokens=cut.text_tokens
                        )
                        for text, cut in zip(texts, cuts, strict=True)
                    ),
                    row_bytes=keeper.row_bytes,
                    coding=keeper.coding,
                    head=None if top else run.head.identify(),
                    top=top,
                    floor=floor,
                    versions=versions,
                )
                writer.finish(header)
            check_unchanged(files)
            work.finish(is_result=is_result)
    return read_pack(out)


def _settings(
    run: ReferenceRun, windows: I32Array, first: int, top: int, with_head: bool, versions: Mapping[str, str]
) -> dict[str, Any]:
    """All that the rows of a pack depend on."""
    return {
        "model": asdict(run.identity),
        "tokens": hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
        "context": windows.shape[1],
        "first": first,
        "top": top,
        "head": with_head,
        "versions": dict(versions),
    }


def base_file_bytes(n_vocab: int, n_window: int, context: int, scored_per_window: int) -> int:
    """Size of the file that `llama-perplexity --kl-divergence-base` writes.

    Source: tools/perplexity/perplexity.cpp of llama.cpp, `process_logits` and `perplexity`.
    """
    row = 2 * (2 * ((n_vocab + 1) // 2) + 4)
    return 8 + 3 * 4 + 4 * n_window * context + n_window * scored_per_window * row


def describe_reference(path: str | Path) -> dict[str, Any] | None:
    """What a report says about a pack: kind, floor and the reference behind it; None if `path` is no pack."""
    if Path(path).is_dir() or not is_pack(path):
        return None
    header = read_pack(path).header
    return {
        "kind": header.kind,
        "top": header.top,
        "coding": header.coding,
        "floor": asdict(header.floor),
        "is_lower_bound": header.kind == "top",
        "model": asdict(header.model),
        "versions": dict(header.versions),
    }


def identify_reference(path: str | Path) -> FileIdentity:
    """Name, size and digest of a file, or of a checkpoint's folder."""
    if Path(path).is_dir():
        from pocketquant.eval.torch_reference import identify_checkpoint

        return identify_checkpoint(Path(path))
    return identify_model(path)


def open_reference(
    path: str | Path,
    *,
    context: int,
    threads: int | None,
    gpu_layers: int,
    flash_attention: bool = False,
    head: Path | None = None,
) -> AbstractContextManager[Runtime]:
    """Opens a GGUF, a checkpoint's folder or a pack as a `Runtime`.

    Args:
        flash_attention: for a GGUF, as in `open_runtime`.
        head: for a pack without its output matrix: the GGUF that it was made from; None to look beside the pack.

    Raises:
        EvalError: it cannot be opened, or was not made for this context.
    """
    if Path(path).is_dir():
        from pocketquant.eval.torch_reference import open_torch_runtime

        return open_torch_runtime(Path(path), context=context, threads=threads)
    if is_pack(path):
        return open_pack(path, context=context, head=head)
    return open_runtime(path, context=context, threads=threads, gpu_layers=gpu_layers, flash_attention=flash_attention)


# ---------------------------------------------------------------- making


@dataclass(frozen=True)
class _GgufRun:
    """A GGUF in llama.cpp, its final hidden states caught while it computes."""

    runtime: Runtime
    head: Head
    identity: FileIdentity
    sizes: Mapping[str, int]
    catcher: StateCatcher | None
    tells_head: bool = True

    def groups(self, tokens: Sequence[int], first: int, *, states: bool) -> Groups:
        for start, logits in self.runtime.logits(tokens, first=first):
            caught = self.catcher.take(len(logits), self.head.n_embd) if states and self.catcher else None
            yield start, caught, logits


@contextmanager
def _open_run(
    model: str | Path,
    context: int,
    threads: int | None,
    gpu_layers: int,
    top: int,
    texts: Sequence[Text],
    chunks: int | None,
) -> Iterator[ReferenceRun]:
    check_size(context, chunks)
    if not texts:
        raise EvalError("no text to run; give at least one")
    for text in texts:  # before a model is loaded
        read_text(text.path)
    if Path(model).is_dir():
        from pocketquant.eval.torch_reference import open_torch_run

        with open_torch_run(Path(model), context=context, threads=threads) as run:
            yield run
        return
    if is_pack(model):
        raise EvalError(f"{model}: is a reference pack already; give the GGUF or the checkpoint")
    catcher = None if top else StateCatcher()
    observe = catcher.see if catcher is not None else None
    with open_runtime(model, context=context, threads=threads, gpu_layers=gpu_layers, observe=observe) as runtime:
        opened = open_gguf(model)
        sizes = {name: opened.sizes[name] for name in ("n_layer", "n_embd", "n_expert") if name in opened.sizes}
        yield _GgufRun(runtime, Head(head_tensor(opened)), identify_model(model), sizes, catcher)


def head_tensor(model: Model) -> Tensor:
    """The output matrix: its own, or the embedding where the two are tied."""
    wanted = Role.EMBED if model.is_tied else Role.HEAD
    return next(tensor for tensor in model.tensors if tensor.role is wanted)


def _cut(
    runtime: Runtime, texts: Sequence[Text], model: str | Path, context: int, chunks: int | None, positions: bool
) -> list[Corpus]:
    cuts = []
    for text in texts:
        if text.is_chat and Path(model).is_dir():
            raise EvalError(f"{text.path}: conversations need the chat template of a GGUF; convert {model} first")
        chat = render_chat(text.path, Path(model)) if text.is_chat else None
        first = 0 if positions else None
        cuts.append(cut_corpus(text.path, runtime, context=context, chunks=chunks, first=first, chat=chat))
    return cuts


def _plan(run: ReferenceRun, cuts: Sequence[Corpus], top: int, with_head: bool) -> ReferencePlan:
    n_vocab = run.runtime.n_vocab
    windows = sum(len(corpus.windows) for corpus in cuts)
    per_window, context = cuts[0].scored_per_window, cuts[0].context
    head_bytes = 0
    if top:
        check_top(top, n_vocab)
        per_row = row_dtype(n_vocab, top).itemsize
    else:
        n_embd = run.head.n_embd
        per_row = max(row_bytes(coding, n_embd) for coding in fitting_codings(n_embd, n_vocab))
        if with_head or not run.tells_head:
            head_bytes = run.head.stored_size
    positions = windows * per_window
    return ReferencePlan(
        windows=windows,
        positions=positions,
        pack_bytes=4 * windows * context + positions * per_row + head_bytes,
        head_bytes=head_bytes,
        base_bytes=base_file_bytes(n_vocab, windows, context, per_window),
    )
