"""A reference pack in the place of a live reference: gives back logits for the windows that it was made from.

It does not tokenize. The tokens of the judged model are looked up in the pack, so another text, another tokenizer or
another context is noticed before anything runs, and the error names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.errors import EvalError, PocketquantError, listing
from pocketquant.eval.packs.pack import Pack, read_pack
from pocketquant.eval.packs.states import Head, codings_for, decode_states, row_bytes
from pocketquant.eval.packs.top_k import MIN_TOP, decode_top, row_dtype
from pocketquant.formats import FORMATS
from pocketquant.gguf_file.identity import identify
from pocketquant.gguf_file.opening import GgufRows, open_gguf
from pocketquant.gguf_file.tensors import GgufTensor, Placed
from pocketquant.llama.runtime import default_rows
from pocketquant.model import Role, Tensor
from pocketquant.texts.corpus import Corpus


class PackRuntime:
    """A pack as a `Runtime`. A pack of top tokens gives `TopRows`, which the model's rows complete."""

    def __init__(self, pack: Pack, head: Head | None) -> None:
        self.pack, self._head = pack, head
        self.n_vocab, self.n_ctx, self.bos = pack.header.n_vocab, pack.header.context, pack.header.bos
        self.vocabulary = pack.header.vocabulary
        self._windows = pack.windows()
        self._places = {window[:-1].tobytes(): i for i, window in reversed(list(enumerate(self._windows)))}

    @property
    def versions(self) -> Mapping[str, str]:
        return self.pack.header.versions

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        raise EvalError(f"{self.pack.path}: a reference pack cannot read text; the judged model's tokens are taken")

    def logits(self, tokens: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, Any]]:
        """As `Runtime.logits`, in groups of its own size.

        Raises:
            EvalError: the pack was not made from these tokens, or not from so early a position on.
        """
        header = self.pack.header
        window = self._places.get(np.array(tokens, "<i4").tobytes())
        if window is None or first < header.first_scored:
            raise EvalError(
                f"{self.pack.path}: holds no such window from position {first} on; make the pack again for this text"
            )
        step = default_rows(self.n_vocab)
        for start in range(first, header.context - 1, step):
            stop = min(start + step, header.context - 1)
            data = self.pack.rows(window, start - header.first_scored, stop - header.first_scored)
            if self._head is None:
                after = self._windows[window, start + 1 : stop + 1]
                yield start, decode_top(data, after, self.n_vocab, header.top)
            else:
                yield start, self._head.logits(decode_states(header.coding, data, self._head.n_embd))

    def check(self, model: Path, text: Path, corpus: Corpus) -> None:
        """Refuses a model, a text or settings other than those the pack was made for.

        Raises:
            EvalError: names what differs.
        """
        path, header = self.pack.path, self.pack.header
        sizes = open_gguf(model).sizes
        wrong = [
            f"{name} = {sizes.get(name)}, the pack's reference has {number}"
            for name, number in ({"n_expert": None} | dict(header.sizes)).items()
            if sizes.get(name) != number
        ]
        if wrong:
            raise EvalError(
                f"{model}: another model than the one {path} was made from, {header.model.name} (SHA-256 "
                f"{header.model.sha256[:12]}):\n{listing(wrong)}"
            )
        if corpus.first_scored < header.first_scored:
            raise EvalError(
                f"{path}: holds positions from {header.first_scored} on, {corpus.first_scored} was asked for; make it "
                "again with --positions"
            )
        known = {window.tobytes() for window in self._windows}
        missing = sum(window.astype("<i4").tobytes() not in known for window in corpus.windows)
        if missing:
            raise EvalError(self._explain(model, text, corpus, missing))

    def _explain(self, model: Path, text: Path, corpus: Corpus, missing: int) -> str:
        path, header = self.pack.path, self.pack.header
        given = identify(text)
        held = "\n" + listing(
            f"{each.name} (SHA-256 {each.sha256[:12]}), {each.windows} windows of {header.context}"
            for each in header.texts
        )
        same = [each for each in header.texts if each.sha256 == given.sha256]
        what = (
            f"{path}: {missing} of {len(corpus.windows)} windows of {text} (SHA-256 {given.sha256[:12]}) are not in it"
        )
        if not same:
            return f"{what}: another text; the pack was made from{held}"
        if same[0].windows < len(corpus.windows) and missing <= len(corpus.windows) - same[0].windows:
            return f"{what}: too few were kept; use --chunks {same[0].windows}, or make the pack from more of the text"
        return (
            f"{what}: it is the same text, but {model} cuts it into other tokens than {header.model.name} "
            f"({corpus.text_tokens}, not {same[0].text_tokens}): another tokenizer, BOS setting or chat template; "
            f"convert both again with the same version"
        )


@contextmanager
def open_pack(path: str | Path, *, context: int | None = None, head: Path | None = None) -> Iterator[PackRuntime]:
    """Opens a reference pack.

    Args:
        context: tokens in the windows that will be scored; None for those of the pack.
        head: the GGUF that holds the output matrix of a pack without a copy of it; None to look beside the pack.

    Raises:
        EvalError: damaged, for another context, or without its output matrix.
    """
    pack = read_pack(path)
    header = pack.header
    if context not in (None, header.context):
        raise EvalError(
            f"{path}: made for windows of {header.context} tokens, {context} were asked for; use --context "
            f"{header.context}, or make the pack again"
        )
    if header.kind == "top":
        if not MIN_TOP <= header.top < header.n_vocab - 1 or header.row_bytes != (
            row_dtype(header.n_vocab, header.top).itemsize
        ):
            raise _contradiction(path, f"{header.top} tokens in {header.row_bytes} bytes")
        yield PackRuntime(pack, None)
        return
    assert header.head is not None
    n_embd = header.head.n_embd
    if header.coding not in codings_for(n_embd) or header.row_bytes != row_bytes(header.coding, n_embd):
        raise _contradiction(path, f"states of {n_embd} numbers as {header.coding!r} in {header.row_bytes} bytes")
    yield PackRuntime(pack, _open_head(pack, head))


def _open_head(pack: Pack, file: Path | None) -> Head:
    wanted, n_vocab = pack.header.head, pack.header.n_vocab
    assert wanted is not None
    section = pack.sections.get("head")
    if section is not None:
        format = FORMATS.get(wanted.format)
        if format is None or wanted.n_embd % format.block_len:
            raise _contradiction(pack.path, f"an output matrix in {wanted.format!r}")
        if section.nbytes != n_vocab * format.row_bytes(wanted.n_embd) or section.sha256 != wanted.sha256:
            raise _contradiction(pack.path, "an output matrix of another size or digest")
        entry = GgufTensor(wanted.name, (n_vocab, wanted.n_embd), format, section.offset, section.nbytes)
        rows = GgufRows(pack.path, Placed(entry.name, entry.shape, (entry,)))
        return Head(Tensor(wanted.name, Role.HEAD, None, entry.shape, format.name, rows))
    source = pack.path.parent / Path(pack.header.model.name).name if file is None else file
    if not source.is_file():
        raise EvalError(
            f"{pack.path}: holds no output matrix, and the file that it was made from, {pack.header.model.name} "
            f"(SHA-256 {pack.header.model.sha256[:12]}), is not at {source}; say where with --head, or make the pack "
            "with --with-head"
        )
    try:
        found = next((tensor for tensor in open_gguf(source).tensors if tensor.name == wanted.name), None)
    except PocketquantError as error:
        raise EvalError(f"{pack.path}: its output matrix cannot be read: {error}") from error
    if found is not None and (found.dtype, found.shape) == (wanted.format, (n_vocab, wanted.n_embd)):
        head = Head(found)
        if head.identify().sha256 == wanted.sha256:
            return head
    raise EvalError(
        f"{source}: another model than the one {pack.path} was made from, {pack.header.model.name} (SHA-256 "
        f"{pack.header.model.sha256[:12]}): its {wanted.name} is not the same {wanted.format} matrix; give that file "
        "with --head"
    )


def _contradiction(path: str | Path, what: str) -> EvalError:
    return EvalError(f"{path}: a reference pack that contradicts itself ({what}); make it again")
