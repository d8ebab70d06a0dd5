"""Runs a GGUF on images with llama.cpp and a vision tower: embeddings, logits, answers.

Source: tools/mtmd/mtmd.h and mtmd-helper.h of llama.cpp (b10359 and after).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.files.small import read_bytes, refuse_other
from pocketquant.formats import F32Array, U8Array
from pocketquant.llama.callbacks import calling
from pocketquant.llama.library import log_callback, require_runtime
from pocketquant.llama.runtime import LlamaRuntime, LlamaSettings
from pocketquant.machine import usable_threads

MAX_IMAGE_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 64 << 20


def open_vision_runtime(
    path: str | Path, mmproj: str | Path, *, context: int, threads: int | None = None, gpu_layers: int = 0
) -> AbstractContextManager[VisionRuntime]:
    """Loads a text model and the vision tower beside it into llama.cpp.

    Args:
        path: GGUF of the text model.
        mmproj: GGUF of the vision tower.
        context: tokens in the longest prompt, those of its images included.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers of the text model computed on a GPU, -1 for all; the tower is there too unless 0.

    Returns:
        A context manager that gives a `VisionRuntime` and frees both at its end.

    Raises:
        EvalError: llama-cpp-python is absent, llama.cpp cannot load a file, or they are not of one model.
    """
    library = require_runtime()
    for file in (path, mmproj):
        refuse_other(file, EvalError)
        if not Path(file).is_file():
            raise EvalError(f"{file}: no such file; give the path of a GGUF")
    threads = threads or usable_threads()
    text = LlamaRuntime(library, Path(path), LlamaSettings(context, threads, gpu_layers))
    return VisionRuntime(text, Path(mmproj), threads)


class VisionRuntime:
    """A text model that can be shown images.

    Images are u8[height, width, 3], red first. llama.cpp resizes them to sides that are multiples of 32 and to between
    8 and 4096 tokens of 32 x 32 pixels; one that fits already is taken as it is.
    """

    def __init__(self, text: LlamaRuntime, mmproj: Path, threads: int) -> None:
        from llama_cpp import mtmd_cpp

        self._text, self._mtmd, self._library = text, mtmd_cpp, text._library
        self.n_vocab = text.n_vocab
        self.n_embd: int = self._library.llama_model_n_embd_inp(text._model)
        mtmd_cpp.mtmd_helper_log_set(log_callback(), ctypes.c_void_p(0))
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = text._gpu_layers != 0
        params.n_threads = threads
        params.print_timings = params.warmup = False
        # fused attention rounds keys and values to F16; this measures the file, not the shortcut
        params.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with calling():
            self._tower = mtmd_cpp.mtmd_init_from_file(os.fsencode(mmproj), text._model, params)
        if not self._tower:
            error = text._failure(
                f"llama.cpp cannot load the vision tower {mmproj} beside it",
                "check that both are of the same model and whole",
            )
            text.close()
            raise error

    @property
    def versions(self) -> Mapping[str, str]:
        """As `Runtime.versions`."""
        return self._text.versions

    def embeddings(self, image: U8Array) -> F32Array:
        """The embeddings of an image: f32[n_tokens, n_embd], one token for each 32 x 32 pixels, line by line."""
        with self._prompt([image]) as chunks:
            kind = self._mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE  # the others are the marks around it
            chunk = next(chunk for chunk in chunks if self._mtmd.mtmd_input_chunk_get_type(chunk) == kind)
            n_tokens = self._mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            with calling():
                status = self._mtmd.mtmd_encode_chunk(self._tower, chunk)
            if status:
                raise self._text._failure("llama.cpp cannot encode the image", "use a smaller one")
            pointer = self._mtmd.mtmd_get_output_embd(self._tower)
            return np.ctypeslib.as_array(pointer, shape=(n_tokens, self.n_embd)).copy()

    def logits(self, prompt: Sequence[str | U8Array]) -> F32Array:
        """Logits f32[n_vocab] after a prompt of texts and images, memory empty at the start.

        The names of special tokens in the texts count as such; `<|vision_start|>` and `<|vision_end|>` are put around
        every image.
        """
        self._show(prompt)
        return self._row()

    def answer(self, prompt: Sequence[str | U8Array], count: int) -> list[int]:
        """The most likely tokens after a prompt of texts and images: at most `count`, the one that ends it included."""
        end = self._show(prompt, count)
        written: list[int] = []
        while True:
            written.append(int(self._row().argmax()))
            if len(written) == count or self._library.llama_vocab_is_eog(self._text._vocab, written[-1]):
                return written
            self._append(written[-1], end + len(written) - 1)

    def follow(self, prompt: Sequence[str | U8Array], tokens: Sequence[int]) -> Iterator[F32Array]:
        """Logits f32[n_vocab] that predict each of `tokens`, were they the answer to the prompt."""
        end = self._show(prompt, len(tokens))
        for i, token in enumerate(tokens):
            yield self._row()
            if i + 1 < len(tokens):
                self._append(token, end + i)

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens stand for, names of special tokens included."""
        return self._text.text(tokens)

    def read_image(self, path: Path) -> U8Array:
        """An image file, PNG or JPEG, as u8[height, width, 3], read by llama.cpp.

        Raises:
            EvalError: it is neither, or too large.
        """
        check_image(path)
        mtmd = self._mtmd
        bitmap = mtmd.mtmd_helper_bitmap_init_from_file(self._tower, os.fsencode(path), False)
        if not bitmap:
            raise EvalError(f"{path}: llama.cpp cannot read it as an image; save it again as PNG or JPEG")
        try:
            shape = (mtmd.mtmd_bitmap_get_ny(bitmap), mtmd.mtmd_bitmap_get_nx(bitmap), 3)
            return np.ctypeslib.as_array(mtmd.mtmd_bitmap_get_data(bitmap), shape=shape).astype(np.uint8)
        finally:
            mtmd.mtmd_bitmap_free(bitmap)

    def _show(self, prompt: Sequence[str | U8Array], more: int = 0) -> int:
        """Decodes a prompt into empty memory, with room for `more` tokens; returns the position after it."""
        text, library = self._text, self._library
        library.llama_memory_clear(library.llama_get_memory(text._context), True)
        with self._prompt(prompt) as chunks:
            start, n_tokens = 0, sum(self._mtmd.mtmd_input_chunk_get_n_tokens(chunk) for chunk in chunks)
            if n_tokens + more > text.n_ctx:
                raise ValueError(f"{n_tokens + more} tokens do not fit a window of {text.n_ctx}")
            for i, chunk in enumerate(chunks):
                after = library.llama_pos(start)
                is_last = i == len(chunks) - 1
                with calling():
                    status = self._mtmd.mtmd_helper_eval_chunk_single(
                        self._tower, text._context, chunk, start, 0, text._batch_tokens, is_last, ctypes.byref(after)
                    )
                if status:
                    raise text._failure(f"llama.cpp cannot decode the prompt (status {status})", "use a shorter one")
                start = after.value
        return start

    def _append(self, token: int, position: int) -> None:
        batch = self._text._batch
        batch.n_tokens, batch.token[0], batch.pos[0], batch.logits[0] = 1, token, position, 1
        self._text._compute("an answer", "use a larger context")

    def _row(self) -> F32Array:
        """Logits f32[n_vocab] after the last token."""
        pointer = self._library.llama_get_logits_ith(self._text._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)).copy()

    @contextmanager
    def _prompt(self, parts: Sequence[str | U8Array]) -> Iterator[list[Any]]:
        """The prompt as llama.cpp's chunks, each of one kind: tokens of text, or an image cut into patches."""
        mtmd, kept = self._mtmd, []
        bitmaps: list[Any] = []
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            for part in parts:
                if isinstance(part, str):
                    data = part.encode()
                    kept.append(mtmd.mtmd_input_text(data, len(data), False, True))
                    kept[-1] = mtmd.mtmd_input_part(ctypes.pointer(kept[-1]), None)
                else:
                    if part.ndim != 3 or part.shape[2] != 3 or part.dtype != np.uint8 or 0 in part.shape:
                        raise ValueError(f"image of {part.dtype} {list(part.shape)}, expected u8 [height, width, 3]")
                    pixels = np.ascontiguousarray(part)
                    pointer = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
                    bitmaps.append(mtmd.mtmd_bitmap_init(part.shape[1], part.shape[0], pointer))  # copies the pixels
                    kept.append(mtmd.mtmd_input_part(None, bitmaps[-1]))
            pointers = [ctypes.pointer(part) for part in kept]
            array = (ctypes.POINTER(mtmd.mtmd_input_part) * len(pointers))(*pointers)
            status = mtmd.mtmd_tokenize_from_parts(self._tower, chunks, array, len(pointers), True)
            if status:
                raise self._text._failure(f"llama.cpp cannot prepare the prompt (status {status})", "check its images")
            yield [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
        finally:
            for bitmap in bitmaps:
                mtmd.mtmd_bitmap_free(bitmap)
            mtmd.mtmd_input_chunks_free(chunks)

    def close(self) -> None:
        """Frees the tower and the text model; a second call does nothing."""
        if self._tower:
            self._mtmd.mtmd_free(self._tower)
            self._tower = None
        self._text.close()

    def __enter__(self) -> VisionRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_image(path: Path) -> None:
    """Refuses what is no PNG or JPEG, or has more than 64 Mi pixels by its header: llama.cpp would decode it all.

    Raises:
        EvalError: with the reason.

    Source: PNG specification (2003), 11.2.2; ITU-T T.81, B.2.2.
    """
    width, height = _size_of(read_bytes(path, MAX_IMAGE_BYTES, EvalError))
    if not 0 < width * height <= MAX_IMAGE_PIXELS:
        said = f"{width} x {height} pixels, at most {MAX_IMAGE_PIXELS} in all" if width * height else "no PNG or JPEG"
        raise EvalError(f"{path}: {said}; scale it, or save it again as PNG or JPEG")


def _size_of(data: bytes) -> tuple[int, int]:
    """(width, height) that the header of a PNG or JPEG states; zeros if it is neither."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame, not a table
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 1 if marker == 0xFF else 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)
    return 0, 0
