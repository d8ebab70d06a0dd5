"""GGML types that published files hold and pocketquant does not read: what they are, for the message that refuses them.

Sources: ggml/include/ggml.h of llama.cpp (as of llama-cpp-python 0.3.36) and of ik_llama.cpp; for 142 and 143 the issue
ggml-org/llama.cpp#29058.
"""

from __future__ import annotations

_FOLDED = "a ternary type of PrismML's fork of llama.cpp, whose weights are folded by a Hadamard rotation"
_INTERLEAVED = "rows interleaved for one kind of CPU, which llama.cpp no longer keeps in files"
_WORKING = "a type that llama.cpp computes with and writes into no model"
_INTEGERS = "numbers that no weights of this family have"

_NAMES: dict[int, tuple[str, str]] = {
    4: ("Q4_2", "removed from llama.cpp in 2023"),
    5: ("Q4_3", "removed from llama.cpp in 2023"),
    9: ("Q8_1", _WORKING),
    15: ("Q8_K", _WORKING),
    24: ("I8", _INTEGERS),
    25: ("I16", _INTEGERS),
    26: ("I32", _INTEGERS),
    27: ("I64", _INTEGERS),
    28: ("F64", _INTEGERS),
    31: ("Q4_0_4_4", _INTERLEAVED),
    32: ("Q4_0_4_8", _INTERLEAVED),
    33: ("Q4_0_8_8", _INTERLEAVED),
    36: ("IQ4_NL_4_4", _INTERLEAVED),
    37: ("IQ4_NL_4_8", _INTERLEAVED),
    38: ("IQ4_NL_8_8", _INTERLEAVED),
    42: ("Q2_0", "a ternary type, with 64 or, in older files, 128 weights to a block; the number does not tell which"),
    142: ("PQ2_0", _FOLDED),
    143: ("PTQ1_0", _FOLDED),
}
_IK_LLAMA = range(97, 400)
"""Numbers that ik_llama.cpp gives to its own types."""


def describe_unread(ggml_id: int) -> str:
    """A type that is not read, for people: "GGML type 142 (PQ2_0: a ternary type of ...) is not read"."""
    if ggml_id in _NAMES:
        name, what = _NAMES[ggml_id]
        return f"GGML type {ggml_id} ({name}: {what}) is not read"
    if ggml_id in _IK_LLAMA:
        return f"GGML type {ggml_id} (one of ik_llama.cpp's own) is not read"
    return f"GGML type {ggml_id} is not supported"
