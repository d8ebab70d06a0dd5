"""References: full precision to judge by, live or kept in a pack.

A reference is a GGUF, which runs beside the model; the folder of a checkpoint, which torch runs (`torch_reference`); or
a pack, which `make_reference` makes once. A pack holds the final hidden states of the reference, from which the output
matrix computes the logits again, or only the most likely tokens. It says how far it is from the live reference
(`Floor`), and it answers only for the tokens that it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.eval.kinship import describe_quantized
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
from pocketquant.texts.corpus import Corpus, Text, check_size, cut_corpus, digest_of_tokens, read_text

MAX_FLOOR = 1e-6
"""A pack whose mean divergence from its reference is this many nats or more is refused."""

_MEASURED = 1024
"""About the number of positions that the floor is measured at; they are spread over all windows."""

Progress = Callable[[int, int], None]
Groups = Iterator[tuple[int, F32Array | None, F32Array]]


class ReferenceRun(Protocol):
    """A reference that runs.

    Attributes:
        runtime: tokenizes, and says what it is.
        head: its output matrix.
        identity: the reference, by content.
        sizes: dimension words -> numbers that the judged model must share.
        tells_head: whether the matrix can be found again if the pack has no copy of it.
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
    """The size of a pack before it is made.

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


@dataclass(frozen=True)
class PackSettings:
    """How a pack is made.

    Attributes:
        context: tokens in a window.
        chunks: the most windows of each text; None for all.
        positions: whether the first half of each window is kept too.
        top: how many of the most likely tokens are kept per position; 0 to keep hidden states.
        with_head: whether the pack gets a copy of the output matrix. One made from a checkpoint always has it.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers computed on a GPU, -1 for all.
        resume: go on where an interrupted run was saved; the pack is the same to the last byte.
        save_seconds: least time between two savings of how far it is.
    """

    context: int = 512
    chunks: int | None = None
    positions: bool = False
    top: int = 0
    with_head: bool = False
    threads: int | None = None
    gpu_layers: int = 0
    resume: bool = False
    save_seconds: float = 60.0


def plan_reference(model: str | Path, texts: Sequence[Text], settings: PackSettings) -> ReferencePlan:
    """Tokenizes the texts and says what a pack would take; errors are those of `make_reference`."""
    with _open_run(model, texts, replace(settings, gpu_layers=0)) as run:
        return _plan(run, _cut(run.runtime, texts, model, settings), settings)


def make_reference(
    model: str | Path,
    texts: Sequence[Text],
    out: str | Path,
    settings: PackSettings,
    *,
    is_result: bool = True,
    progress: Progress | None = None,
) -> Pack:
    """Runs a reference over texts and keeps what later comparisons need.

    Args:
        model: a GGUF in full precision, or the folder of a checkpoint.
        texts: the texts, as for `compare`.
        out: the pack to write; unfinished work lies beside it as `.NAME.unfinished` and `.NAME.state`.
        settings: how the pack is made.
        is_result: as in `put_in_place`.
        progress: told after each window.

    Raises:
        EvalError: something cannot be read or run, the unfinished work is of another run, or what the pack gives back
            is further from the reference than `MAX_FLOOR`.
        OutputError: the pack cannot be written; an earlier one stays.
        SourceError: model or text was changed during the run.
    """
    files = states_of(model, *(text.path for text in texts))
    with _open_run(model, texts, settings) as run:
        cuts = _cut(run.runtime, texts, model, settings)
        keeper = TopKeeper(run.runtime.n_vocab, settings.top) if settings.top else StateKeeper(run.head)
        stores_head = not settings.top and (settings.with_head or not run.tells_head)
        work = UnfinishedPack(Path(out), _depends_on(run, cuts, settings, stores_head), settings.save_seconds)
        with work.begun(resume=settings.resume):
            with PackWriter(work.path) as writer:
                _write_rows(writer, work, run, keeper, cuts, progress)
                if stores_head:
                    for piece in run.head.stored_bytes():
                        writer.add("head", piece)
                floor = keeper.floor()
                if floor.kld_mean >= MAX_FLOOR:
                    raise EvalError(
                        f"{model}: the pack would be {floor.kld_mean:g} nats from the reference itself, more than "
                        f"{MAX_FLOOR:g}; make it from a file in f32, bf16, f16 or q8_0, or run both files side by side"
                    )
                header = _header(run, keeper, texts, cuts, settings)
                writer.finish(replace(header, quantized=describe_quantized(Path(model))))
            check_unchanged(files)
            work.finish(is_result=is_result)
    return read_pack(out)


def _write_rows(
    writer: PackWriter,
    work: UnfinishedPack,
    run: ReferenceRun,
    keeper: TopKeeper | StateKeeper,
    cuts: Sequence[Corpus],
    progress: Progress | None,
) -> None:
    """Writes the tokens of all windows, and a row for each scored position that is not there yet."""
    windows, first = np.concatenate([corpus.windows for corpus in cuts]), cuts[0].first_scored
    stride = max(windows.shape[0] * cuts[0].scored_per_window // _MEASURED, 1)
    writer.add("tokens", windows.astype("<i4").view(np.uint8))
    if work.windows:
        keeper.take_up(work.kept)
    work.take_up(writer)
    if progress is not None:
        progress(work.windows, len(windows))
    for done, window in enumerate(windows[work.windows :], start=work.windows + 1):
        for start, states, logits in run.groups(window[:-1].tolist(), first, states=isinstance(keeper, StateKeeper)):
            after = window[start + 1 : start + 1 + len(logits)]
            writer.add("rows", keeper.keep(states, logits, after, is_measured=(done - 1) % stride == 0))
        if progress is not None:
            progress(done, len(windows))
        work.reached(done, keeper.state(), is_last=done == len(windows))


def _header(
    run: ReferenceRun,
    keeper: TopKeeper | StateKeeper,
    texts: Sequence[Text],
    cuts: Sequence[Corpus],
    settings: PackSettings,
) -> PackHeader:
    return PackHeader(
        kind="top" if settings.top else "states",
        model=run.identity,
        sizes=dict(run.sizes),
        vocabulary=run.runtime.vocabulary,
        n_vocab=run.runtime.n_vocab,
        bos=run.runtime.bos,
        context=settings.context,
        first_scored=cuts[0].first_scored,
        texts=tuple(
            TextIdentity(**asdict(identify(text.path)), windows=len(cut.windows), text_tokens=cut.text_tokens)
            for text, cut in zip(texts, cuts, strict=True)
        ),
        row_bytes=keeper.row_bytes,
        coding=keeper.coding,
        head=None if settings.top else run.head.identify(),
        top=settings.top,
        floor=keeper.floor(),
        versions=_versions(run),
    )


def _versions(run: ReferenceRun) -> dict[str, str]:
    return list_versions() | dict(run.runtime.versions)


def _depends_on(run: ReferenceRun, cuts: Sequence[Corpus], settings: PackSettings, stores_head: bool) -> dict[str, Any]:
    """All that the rows of a pack depend on."""
    windows: I32Array = np.concatenate([corpus.windows for corpus in cuts])
    return {
        "model": asdict(run.identity),
        "tokens": digest_of_tokens(windows),
        "context": windows.shape[1],
        "first": cuts[0].first_scored,
        "top": settings.top,
        "head": stores_head,
        "versions": _versions(run),
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
        **({"quantized": header.quantized} if header.quantized else {}),
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
        EvalError: it cannot be opened, was not made for this context, or needs no head.
    """
    if head is not None and (Path(path).is_dir() or not is_pack(path)):
        raise EvalError(f"{path}: no reference pack, so it needs no {head}; leave --head out")
    if Path(path).is_dir():
        from pocketquant.eval.torch_reference import open_torch_runtime

        return open_torch_runtime(Path(path), context=context, threads=threads)
    if is_pack(path):
        return open_pack(path, context=context, head=head)
    return open_runtime(path, context=context, threads=threads, gpu_layers=gpu_layers, flash_attention=flash_attention)


# ---------------------------------------------------------------- making


@dataclass(frozen=True)
class _GgufRun:
    """A GGUF that llama.cpp runs, and what catches its final hidden states."""

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
def _open_run(model: str | Path, texts: Sequence[Text], settings: PackSettings) -> Iterator[ReferenceRun]:
    check_size(settings.context, settings.chunks)
    if not texts:
        raise EvalError("no text to run; give at least one")
    for text in texts:  # before a model is loaded
        read_text(text.path)
    if Path(model).is_dir():
        from pocketquant.eval.torch_reference import open_torch_run

        with open_torch_run(Path(model), context=settings.context, threads=settings.threads) as run:
            yield run
        return
    if is_pack(model):
        raise EvalError(f"{model}: is a reference pack already; give the GGUF or the checkpoint")
    catcher = None if settings.top else StateCatcher()
    with open_runtime(
        model,
        context=settings.context,
        threads=settings.threads,
        gpu_layers=settings.gpu_layers,
        observe=catcher.see if catcher is not None else None,
    ) as runtime:
        opened = open_gguf(model)
        sizes = {name: opened.sizes[name] for name in ("n_layer", "n_embd", "n_expert") if name in opened.sizes}
        yield _GgufRun(runtime, Head(head_tensor(opened)), identify_model(model), sizes, catcher)


def head_tensor(model: Model) -> Tensor:
    """The output matrix: its own, or the embedding where the two are tied."""
    wanted = Role.EMBED if model.is_tied else Role.HEAD
    return next(tensor for tensor in model.tensors if tensor.role is wanted)


def _cut(runtime: Runtime, texts: Sequence[Text], model: str | Path, settings: PackSettings) -> list[Corpus]:
    cuts, context, chunks = [], settings.context, settings.chunks
    for text in texts:
        if text.is_chat and Path(model).is_dir():
            raise EvalError(f"{text.path}: conversations need the chat template of a GGUF; convert {model} first")
        chat = render_chat(text.path, Path(model)) if text.is_chat else None
        first = 0 if settings.positions else None
        cuts.append(cut_corpus(text.path, runtime, context=context, chunks=chunks, first=first, chat=chat))
    return cuts


def _plan(run: ReferenceRun, cuts: Sequence[Corpus], settings: PackSettings) -> ReferencePlan:
    n_vocab, top = run.runtime.n_vocab, settings.top
    windows = sum(len(corpus.windows) for corpus in cuts)
    per_window, context = cuts[0].scored_per_window, cuts[0].context
    head_bytes = 0
    if top:
        check_top(top, n_vocab)
        per_row = row_dtype(n_vocab, top).itemsize
    else:
        n_embd = run.head.n_embd
        per_row = max(row_bytes(coding, n_embd) for coding in fitting_codings(n_embd, n_vocab))
        if settings.with_head or not run.tells_head:
            head_bytes = run.head.stored_size
    positions = windows * per_window
    return ReferencePlan(
        windows=windows,
        positions=positions,
        pack_bytes=4 * windows * context + positions * per_row + head_bytes,
        head_bytes=head_bytes,
        base_bytes=base_file_bytes(n_vocab, windows, context, per_window),
    )
