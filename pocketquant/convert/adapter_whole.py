"""Weights that an adapter brings along whole, by the names that PEFT saves them under.

Trained ones (`modules_to_save`) stand under the model's own names. Where an embedding was resized or targeted, PEFT
saves all that hangs below it: `X.base_layer.weight` below LoRA, `X.original_module.weight` and a copy as
`X.modules_to_save.weight` below a wrapper. Loading takes the plain name for the trained weights and ignores the copy.
Source: PEFT 0.21.2 `utils/save_and_load.py`, `utils/other.py` (`ModulesToSaveWrapper`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pocketquant.convert.safetensors import StoredTensor

_BELOW = (".base_layer.", ".original_module.")
_COPY = ".modules_to_save."


@dataclass(frozen=True)
class WholeWeights:
    """Whole weights by their module, or by their own name where it does not end in `.weight`.

    Attributes:
        base: of the base model as it was in training.
        trained: that replace the base model's.
    """

    base: Mapping[str, StoredTensor]
    trained: Mapping[str, StoredTensor]


def sort_whole(named: Mapping[str, StoredTensor], saved: Sequence[str]) -> tuple[WholeWeights, list[str]]:
    """Tells trained weights from the base model's, and what is neither.

    Args:
        named: name in the trained model -> tensor, of those that are no LoRA matrices.
        saved: `modules_to_save`.
    """
    base: dict[str, StoredTensor] = {}
    below: dict[str, StoredTensor] = {}
    trained: dict[str, StoredTensor] = {}
    problems = []
    for name, tensor in named.items():
        wrapper = next((wrapper for wrapper in _BELOW if wrapper in name), None)
        if wrapper is not None:
            below[_key(name.replace(wrapper, "."))] = tensor
        elif _COPY in name:
            module, _, rest = name.partition(_COPY)
            plain = f"{module}.{rest}"
            if plain not in named and f"{module}.{rest.partition('.')[2]}" not in named:
                problems.append(f"{name}: a copy of {plain}, which PEFT loads, and which is missing")
        elif _is_saved(name, saved):
            trained[_key(name)] = tensor
        elif name.endswith(".weight"):
            base[_key(name)] = tensor
        else:
            problems.append(f"{name} {tensor.dtype} {list(tensor.shape)}")
    return WholeWeights({**base, **below}, trained), problems


def _key(name: str) -> str:
    return name.removesuffix(".weight")


def _is_saved(name: str, saved: Sequence[str]) -> bool:
    """Whether one of the modules that the weight belongs to ends with one of the names, as PEFT compares them."""
    parts = name.split(".")[:-1]
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(module.endswith(end) for module in modules for end in saved if end)
