"""A Hugging Face checkpoint as the reference, run by transformers on torch in f32.

It can judge the conversion itself, because the checkpoint is read, tokenized and computed by code that has nothing in
common with pocketquant or llama.cpp. The extra `reference` installs what it needs; both are imported when first used.

Source: transformers 5, `AutoModelForCausalLM`; the decoder's last hidden state is the one after the final norm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.eval.packs.states import Head
from pocketquant.extras import install_command
from pocketquant.files.reading import sha256_of
from pocketquant.formats import FORMATS, F32Array
from pocketquant.gguf_file.identity import FileIdentity
from pocketquant.llama.runtime import Runtime, default_rows
from pocketquant.machine import usable_threads
from pocketquant.model import Role, Tensor

_FILES = ("config.json", "tokenizer.json", "*.safetensors")


class TorchRuntime:
    """A checkpoint in torch as a `Runtime`. Its vocabulary has no digest; texts show whether it is ours."""

    bos: int | None = None
    vocabulary = ""

    def __init__(self, folder: Path, context: int, threads: int | None) -> None:
        torch, transformers = require_transformers()
        self._torch, self._folder = torch, folder
        torch.set_num_threads(threads or usable_threads())
        transformers.utils.logging.disable_progress_bar()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
            ).eval()
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise EvalError(f"{folder}: transformers cannot load it: {error}") from error
        self._matrix = self._model.get_output_embeddings().weight.detach()
        self.n_vocab, self.n_embd = self._matrix.shape
        self.n_ctx = context
        trained = getattr(self._model.config, "max_position_embeddings", context)
        if context > trained:
            raise EvalError(f"{folder}: a context of {context} tokens was asked for, the model is made for {trained}")

    @property
    def versions(self) -> Mapping[str, str]:
        return {name: metadata.version(name) for name in ("torch", "transformers")}

    @property
    def n_layer(self) -> int:
        """Blocks of the model."""
        return int(self._model.config.get_text_config().num_hidden_layers)

    @property
    def matrix(self) -> F32Array:
        """The output matrix f32[n_vocab, n_embd]; a view."""
        return self._matrix.numpy()

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"])

    def states(self, tokens: Sequence[int]) -> Any:
        """Final hidden states, a tensor f32[n, n_embd]."""
        with self._torch.no_grad():
            ids = self._torch.tensor([list(tokens)])
            return self._model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]

    def groups(self, tokens: Sequence[int], first: int) -> Iterator[tuple[int, F32Array, F32Array]]:
        """(position of the first row, states f32[n, n_embd], logits f32[n, n_vocab]) from position `first` on."""
        if not 0 <= first < len(tokens) <= self.n_ctx:
            raise ValueError(f"{len(tokens)} tokens, scored from {first}, do not fit a window of {self.n_ctx}")
        states, step = self.states(tokens), default_rows(self.n_vocab)
        for start in range(first, len(tokens), step):
            part = states[start : start + step]
            with self._torch.no_grad():
                logits = part @ self._matrix.T
            yield start, part.numpy(), logits.numpy()

    def logits(self, tokens: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, F32Array]]:
        for start, _, logits in self.groups(tokens, first):
            yield start, logits


@dataclass(frozen=True)
class TorchRun:
    """A checkpoint that a pack is made from; its output matrix always goes into the pack."""

    runtime: TorchRuntime
    head: Head
    identity: FileIdentity
    sizes: Mapping[str, int]
    tells_head: bool = False

    def groups(
        self, tokens: Sequence[int], first: int, *, states: bool
    ) -> Iterator[tuple[int, F32Array | None, F32Array]]:
        return self.runtime.groups(tokens, first)


@contextmanager
def open_torch_runtime(folder: Path, *, context: int, threads: int | None) -> Iterator[Runtime]:
    """Loads a checkpoint.

    Raises:
        EvalError: torch or transformers is absent, or cannot load the folder.
    """
    yield TorchRuntime(folder, context, threads)


@contextmanager
def open_torch_run(folder: Path, *, context: int, threads: int | None) -> Iterator[TorchRun]:
    """Loads a checkpoint to make a pack from; errors are those of `open_torch_runtime`."""
    runtime = TorchRuntime(folder, context, threads)
    sizes = {"n_layer": runtime.n_layer, "n_embd": runtime.n_embd}
    yield TorchRun(runtime, Head(_matrix_tensor(runtime.matrix)), identify_checkpoint(folder), sizes)


def identify_checkpoint(folder: Path) -> FileIdentity:
    """A checkpoint by content: the digest is that of a list of its config, tokenizer and weights with theirs."""
    files = sorted(path for pattern in _FILES for path in folder.glob(pattern))
    if not files:
        raise EvalError(f"{folder}: no checkpoint (neither config.json nor weights); give its folder or a GGUF")
    try:
        lines = [f"{sha256_of(path)}  {path.name}\n" for path in files]
        size = sum(path.stat().st_size for path in files)
    except OSError as error:
        raise EvalError(f"{folder}: cannot be read ({error.strerror}); check the path") from error
    return FileIdentity(folder.resolve().name, size, hashlib.sha256("".join(lines).encode()).hexdigest())


def require_transformers() -> tuple[Any, Any]:
    """torch and transformers.

    Raises:
        EvalError: one of them is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise EvalError(
            f"a checkpoint as the reference needs torch and transformers, which cannot be imported here ({error}); "
            f"{install_command('reference')}, or convert it to a GGUF in f32"
        ) from error
    return torch, transformers


@dataclass(frozen=True)
class _ArrayRows:
    """Rows of an array in memory; a `RowSource`."""

    array: F32Array
    dtype: str

    def rows(self, start: int, stop: int) -> F32Array:
        return self.array[start:stop]

    def stored(self, start: int, stop: int) -> Any:
        return FORMATS[self.dtype].encode(self.array[start:stop])


def _matrix_tensor(matrix: F32Array) -> Tensor:
    # most checkpoints are BF16, and then the matrix fits into it as it is
    is_bf16 = not (np.ascontiguousarray(matrix).view("<u4") & np.uint32(0xFFFF)).any()
    dtype = "BF16" if is_bf16 else "F32"
    return Tensor("output.weight", Role.HEAD, None, matrix.shape, dtype, _ArrayRows(matrix, dtype))
