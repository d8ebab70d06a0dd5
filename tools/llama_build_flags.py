"""Prints the compiler flags that llama-cpp-python needs to be built right by the C++ compiler of this machine, if any.

GCC before 12.4 and 13.3 declares only the first eight bytes that `_tile_loadconfig` reads as its input, and so drops
the stores of the others. llama.cpp's AMX kernels then run on tiles that nobody set up, which ends in an illegal
instruction. A build for the machine at hand (llama.cpp's default) contains these kernels where the processor has AMX.
The compiler is tried rather than asked for its version, since distributions mend old versions too.

Source: gcc/config/i386/amxtileintrin.h of GCC 12.2 and 14; ggml/src/ggml-cpu/amx/mmq.cpp of llama.cpp (b10359).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess

WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"

_PROGRAM = """
#include <immintrin.h>
struct alignas(64) config { unsigned char bytes[64]; };
void load(unsigned char x) { config c = {}; c.bytes[16] = x; _tile_loadconfig(&c); }
"""
_ARGUMENT = re.compile(r"\b[re]?dil?\b")
"""The register that holds `x`: x86-64 System V ABI, 3.2.3. Assembly that never names it never stores `x`."""


def main() -> None:
    """Prints nothing where the compiler is right, knows no AMX, or is missing."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    command = [*compiler, "-x", "c++", "-std=c++17", "-O2", "-mamx-tile", "-S", "-o", "-", "-"]
    try:
        done = subprocess.run(command, input=_PROGRAM, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return
    if done.returncode == 0 and "ldtilecfg" in done.stdout and not _ARGUMENT.search(done.stdout):
        print(WITHOUT_AMX)


if __name__ == "__main__":
    main()
