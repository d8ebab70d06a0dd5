"""What llama.cpp itself says of its buffers while it opens a file: the oracle of `fit`.

A file without weights will do: with `no_alloc` llama.cpp goes through a load and computes its buffers without having
them. Such a file is a header and a hole (`hollow_gguf`).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketquant.fit import Settings
from pocketquant.llama.library import log_callback, require_runtime
from pocketquant.model import Plan

_BUFFER = re.compile(r" (\S+) +(model|KV|RS|compute) buffer size = +([\d.]+) MiB")
_CACHE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB")
_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
MIB = 1 << 20


def hollow_gguf(path: Path, plan: Plan) -> Path:
    """The file of a plan with a hole in place of its weights."""
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.file_bytes)
    return path


def cpu_kind(library: Any) -> str:
    """The key of `REPACKED_ROWS` for this machine."""
    features = library.llama_print_system_info().decode()
    if "AMX" in features:
        return "amx"
    kinds = {"AVX512 = 1": "avx512", "AVX2 = 1": "avx2", "NEON = 1": "arm"}
    return next((kind for mark, kind in kinds.items() if mark in features), "none")


@dataclass
class Loaded:
    """A file that is open in llama.cpp. `model_bytes` are those of its buffers for weights, by their names."""

    library: Any
    model: Any
    lines: list[str]
    listen: Any
    model_bytes: dict[str, float]

    def measure(self, settings: Settings, *, drafts: bool = False) -> dict[str, float]:
        """Bytes of the KV cache, the recurrent state and the compute buffer, to a hundredth of a MiB.

        `drafts` opens the context of a multi-token-prediction block.
        """
        library = self.library
        params = library.llama_context_default_params()
        params.n_ctx, params.n_ubatch, params.n_batch = settings.context, settings.ubatch, max(2048, settings.ubatch)
        params.n_outputs_max, params.n_seq_max, params.n_rs_seq = settings.outputs, settings.sequences, settings.draft
        params.type_k, params.type_v = _TYPES[settings.cache_type_k], _TYPES[settings.cache_type_v]
        params.flash_attn_type, params.kv_unified = int(settings.flash_attention), True
        params.ctx_type = int(drafts)
        self.lines.clear()
        context = library.llama_init_from_model(self.model, params)
        assert context, self.lines[-5:]
        library.llama_free(context)
        found = {"KV": 0.0, "RS": 0.0, "compute": 0.0}
        for line in self.lines:
            if (match := _BUFFER.search(line)) and match[2] in ("RS", "compute"):
                found[match[2]] += float(match[3]) * MIB
            if match := _CACHE.search(line):
                found["KV"] += float(match[1]) * MIB
        return found

    def tower_buffer(self, mmproj: Path, *, flash_attention: bool) -> float:
        """Bytes that llama.cpp sets aside for images when it loads a vision tower beside the model."""
        from llama_cpp import mtmd_cpp

        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.warmup, params.flash_attn_type = False, True, int(flash_attention)
        self.lines.clear()
        mtmd_cpp.mtmd_helper_log_set(self.listen, ctypes.c_void_p(0))
        try:
            tower = mtmd_cpp.mtmd_init_from_file(os.fsencode(mmproj), self.model, params)
            assert tower, self.lines[-5:]
            mtmd_cpp.mtmd_free(tower)
        finally:
            mtmd_cpp.mtmd_helper_log_set(log_callback(), ctypes.c_void_p(0))
        return sum(float(match[3]) * MIB for line in self.lines if (match := _BUFFER.search(line)))


@contextmanager
def loaded(path: Path, *, weights: bool = False, repack: bool = False, has_mtp: bool = False) -> Iterator[Loaded]:
    """Opens a file, with its weights or without, with its multi-token-prediction block or without."""
    library = require_runtime()
    lines: list[str] = []
    listen = library.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    library.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        params = library.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts, params.load_mtp = 0, repack, has_mtp
        if not weights:
            params.no_alloc, params.load_mode = True, 0
        model = library.llama_model_load_from_file(os.fsencode(path), params)
        assert model, lines[-5:]
        matches = [match for line in lines if (match := _BUFFER.search(line)) and match[2] == "model"]
        yield Loaded(library, model, lines, listen, {match[1]: float(match[3]) * MIB for match in matches})
        library.llama_model_free(model)
    finally:
        library.llama_log_set(log_callback(), ctypes.c_void_p(0))
