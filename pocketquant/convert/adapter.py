"""A PEFT LoRA adapter, opened and checked: which modules it changes, by which two matrices, at which scale.

Only plain LoRA is taken: W + scale * B @ A. Whatever else adapter_config.json can ask for changes what the matrices
mean, so it is refused by name, and so is a setting that we have never heard of. Names, settings and their meaning:
PEFT 0.21.2, `tuners/lora/config.py`, `tuners/lora/layer.py`, `utils/save_and_load.py`, `utils/other.py`.

Fused experts are parameters and no modules, so PEFT targets them by `target_parameters` and keeps the factors of all
experts in one pair: A holds them one below the other, B takes turns (column r * n_expert + e). The second parameter of
a module is wrapped around the first, whose matrices then lie at `base_layer` (ParamWrapper, `tuners/lora/layer.py`).
PEFT before 0.19 took an expert's rows for its inputs, so there A and B change places (0.17.1 to 0.19.0 compared).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketquant.convert.adapter_whole import sort_whole
from pocketquant.convert.mapping import READABLE
from pocketquant.convert.safetensors import StoredTensor, read_safetensors_header
from pocketquant.errors import SourceError, listing
from pocketquant.files.small import is_present, kind_of, read_object, refuse_other
from pocketquant.files.unchanged import FileState, state_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"} | {
    "init_lora_weights",
    "bias",
    "target_parameters",
    "peft_version",
    "ensure_weight_tying",
}
_WITHOUT_EFFECT = {
    # about training, or about which modules get matrices: the tensors themselves say that
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config"),
}
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Those that leave the base weights alone; the others subtract something from them that the adapter does not hold."""
_MAX_RANK = 1 << 16
_MAX_NAME = 192
_ALPHAS = (1e-9, 1e9)  # beyond, a scale is nothing or everything in f32
_MAX_PATTERNS = 4096
_PARAMETERS = ("gate_up_proj", "down_proj", "weight")
"""Parameters that can be targets, in their order within a module: the first one is wrapped first."""
_FACTORS_SWAPPED_SINCE = (0, 19)


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one module's weight: scale * B @ A, or its transpose for an embedding.

    Attributes:
        module: its path in the model that was trained: "model.layers.0.mlp.up_proj".
        a: [rank, cols] of the weight; [rank, rows] for an embedding.
        b: [rows, rank] of the weight; [cols, rank] for an embedding.
        scale: alpha / rank, or alpha / sqrt(rank).
        is_embedding: A's columns are the weight's rows.
        n_expert: experts whose factors the two matrices hold, 1 where the weight is a matrix.
        is_transposed: the product of the factors is the matrix transposed, an embedding's the embedding; None where
            nothing says so (an expert's).
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    scale: float
    is_embedding: bool
    n_expert: int = 1
    is_transposed: bool | None = False

    @property
    def is_turned(self) -> bool:
        """Whether A's columns are the weight's rows."""
        return self.is_embedding != bool(self.is_transposed)

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.n_expert

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, cols] of the weight, of one expert's where there are several."""
        rows, cols = self.b.shape[0], self.a.shape[1]
        return (cols, rows) if self.is_turned else (rows, cols)

    def fitted(self, shape: tuple[int, ...]) -> LowRank | None:
        """The same for a weight of that shape, None if it is of another one; the shape tells how experts' factors lie.

        Raises:
            SourceError: both ways fit, and nothing says which one it is.
        """
        if self.n_expert == 1:
            return self if self.shape == shape else None
        ways = [replace(self, is_transposed=flag) for flag in (False, True)]
        fitting = [way for way in ways if way.shape == shape]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        if self.is_transposed is None:
            raise SourceError(
                f"{self.module}: experts' matrices {list(shape)} are square, and {CONFIG} has no peft_version that "
                "would tell their rows from their columns; save the adapter with PEFT 0.19 or later"
            )
        return self


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, opened; no matrix read.

    Attributes:
        name: of its folder.
        changes: what is added to which module, in the order of their names.
        base_weights: module -> weight of the base model as it was in training, saved along (see `adapter_whole`).
        trained_weights: module -> weight that was trained whole (`modules_to_save`).
        folder: where it lies.
        keeps_tie: embedding and head were trained as one where they are tied (`ensure_weight_tying`).
        files: what it was opened from, as that was then.
    """

    name: str
    changes: tuple[LowRank, ...]
    base_weights: Mapping[str, StoredTensor]
    trained_weights: Mapping[str, StoredTensor]
    folder: Path | None = None
    keeps_tie: bool = False
    files: tuple[FileState, ...] = ()


def open_adapter(folder: Path | str) -> Adapter:
    """Opens a folder with adapter_config.json and adapter_model.safetensors, or mlx-lm's adapters.safetensors.

    Raises:
        SourceError: files missing or broken, another method than plain LoRA, matrices missing, of a wrong shape or type
            or unknown (all listed).
    """
    folder = Path(folder)
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    if kind_of(folder) == "file":
        raise SourceError(f"{folder}: is a file; give the folder that PEFT's save_pretrained wrote")
    refuse_other(folder)
    if not is_present(config_path):
        raise SourceError(f"{folder}: no {CONFIG}; give the folder that PEFT's save_pretrained wrote")
    config = read_object(config_path)
    from pocketquant.convert.adapter_mlx import is_of_mlx, open_mlx_adapter  # which is made of what stands here

    if is_of_mlx(config):
        return open_mlx_adapter(folder, config)
    if not is_present(weights_path):
        found = " (a pickled adapter_model.bin is not read)" if (folder / "adapter_model.bin").exists() else ""
        raise SourceError(f"{folder}: no {WEIGHTS}{found}; save the adapter as safetensors")
    files = (state_of(config_path), state_of(weights_path))
    problems = _config_problems(config)
    if problems:
        raise SourceError(
            f"{config_path}: the adapter is more than plain LoRA, or cannot be read as such; merge it with PEFT "
            f"(merge_and_unload) and convert the result:\n{listing(problems)}"
        )
    matrices, named_whole, problems = _sort_tensors(read_safetensors_header(weights_path))
    whole, more = sort_whole(named_whole, config.get("modules_to_save") or [])
    problems += more
    changes = []
    named, more = _name_parameters(matrices, config)
    problems += more
    for (module, is_embedding), pair in sorted(named.items()):
        change = _low_rank(module, is_embedding, pair, config)
        if isinstance(change, str):
            problems.append(f"{module}: {change}")
        else:
            changes.append(change)
    if problems:
        raise SourceError(f"{weights_path}: tensors that no plain LoRA adapter has:\n{listing(problems)}")
    if not changes and not whole.trained:
        raise SourceError(f"{weights_path}: holds no LoRA matrices")
    keeps_tie = bool(config.get("ensure_weight_tying"))
    return Adapter(folder.resolve().name, tuple(changes), whole.base, whole.trained, folder.resolve(), keeps_tie, files)


# ---------------------------------------------------------------- settings


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type {config.get('peft_type')!r}, expected 'LORA'")
    if type(config.get("r")) is not int or not 1 <= config["r"] <= _MAX_RANK:
        problems.append(f"r {config.get('r')!r}, expected an integer from 1 to {_MAX_RANK}")
    if not is_scale(config.get("lora_alpha")):
        problems.append(f"lora_alpha {config.get('lora_alpha')!r}, expected a number from {_ALPHAS[0]} to {_ALPHAS[1]}")
    if config.get("bias", "none") != "none":
        problems.append(f"bias {config['bias']!r}: biases were trained too, and no Qwen3.5 projection has one")
    start = config.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _INITIALIZATIONS:
        problems.append(
            f"init_lora_weights {start!r}: changes the base weights before training; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it a plain one"
        )
    for key in ("use_rslora", "ensure_weight_tying"):
        if type(config.get(key) or False) is not bool:
            problems.append(f"{key} {str(config[key])[:80]!r}, expected true or false")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        problems.append(f"modules_to_save {str(saved)[:80]!r}, expected a list of names")
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        problems.append(f"target_parameters {str(parameters)[:80]!r}, expected a list of names")
    for key in ("rank_pattern", "alpha_pattern"):
        problems += _pattern_problems(key, config.get(key) or {})
    problems += [
        f"{key} {str(value)[:80]!r}: not supported"
        for key, value in config.items()
        if value and key not in _READ and key not in _WITHOUT_EFFECT
    ]
    return problems


def is_scale(value: Any) -> bool:
    """Whether it is a number that a change can be scaled by."""
    return type(value) in (int, float) and _ALPHAS[0] <= value <= _ALPHAS[1]


def _pattern_problems(key: str, patterns: Any) -> list[str]:
    """Patterns are regular expressions of whoever made the adapter; those that could run for ages are refused."""
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        return [f"{key}: expected an object of at most {_MAX_PATTERNS} names"]
    problems = []
    for pattern, value in patterns.items():
        quantifiers = len(re.findall(r"[*+{]|(?<!\()\?", pattern))
        is_whole = type(value) is int and 1 <= value <= _MAX_RANK
        if not (is_whole if key == "rank_pattern" else is_scale(value)):
            problems.append(f"{key} {pattern!r}: {value!r}")
        elif len(pattern) > _MAX_NAME or quantifiers > 2 or re.search(r"\)[*+{]|\\\d|\(\?[^:=!]", pattern):
            problems.append(f"{key} {pattern[:80]!r}: too intricate a pattern; write the modules' names")
        else:
            try:
                re.compile(_whole(pattern))
            except (re.error, OverflowError, RecursionError) as error:
                problems.append(f"{key} {pattern!r}: {error}")
    return problems


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _chosen(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the module's name ends with, at a dot; as PEFT's `get_pattern_key`."""
    matching = (value for pattern, value in (patterns or {}).items() if re.match(_whole(pattern), module))
    return next(matching, default)


# ---------------------------------------------------------------- tensors

_OF_MODULE = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
_OF_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?")
"""Module, A or B, name of the adapter. An embedding has parameters where others have modules with a weight."""

_OF_EXPERTS = re.compile(r"\bexperts\.(gate_up_proj|down_proj)$")
_WRAPPED = ".base_layer"

_Matrices = dict[tuple[str, bool], dict[str, StoredTensor]]


def _sort_tensors(stored: list[StoredTensor]) -> tuple[_Matrices, dict[str, StoredTensor], list[str]]:
    """(module, is embedding) -> its A and B; name -> whole weight; names that are neither."""
    matrices: _Matrices = {}
    whole: dict[str, StoredTensor] = {}
    problems, adapters = [], set()
    for tensor in stored:
        name = tensor.name.removeprefix("base_model.model.")
        is_short = len(name) <= _MAX_NAME
        match = (_OF_MODULE.fullmatch(name) or _OF_EMBEDDING.fullmatch(name)) if is_short else None
        if match:
            pair = matrices.setdefault((match[1], match.re is _OF_EMBEDDING), {})
            if match[2] in pair:
                problems.append(f"{name}: a second {match[2]} matrix of the module")
            pair[match[2]] = tensor
            adapters.add(match[3] or "")
        elif is_short and "lora_" not in name:
            whole[name] = tensor
        else:
            problems.append(f"{name[:_MAX_NAME]} {tensor.dtype} {list(tensor.shape)}")
    if len(adapters) > 1:
        problems.append(f"matrices of several adapters: {', '.join(sorted(repr(name) for name in adapters))}")
    return matrices, whole, problems


def _name_parameters(matrices: _Matrices, config: Mapping[str, Any]) -> tuple[_Matrices, list[str]]:
    """The same with a targeted parameter's name behind the module's, which patterns are about; and problems."""
    targets = tuple(f".{name}" for name in config.get("target_parameters") or [])
    named: _Matrices = {}
    problems = []
    depths: dict[str, list[tuple[str, bool]]] = {}
    for key in sorted(matrices, key=lambda key: -key[0].count(_WRAPPED)):  # the innermost first
        depths.setdefault(key[0].replace(_WRAPPED, ""), []).append(key)
    for module, keys in depths.items():
        wanted = [name for name in _PARAMETERS if targets and f".{module}.{name}".endswith(targets)]
        if not wanted and len(keys) == 1 and _WRAPPED not in keys[0][0]:
            named[keys[0]] = matrices[keys[0]]
        elif len(wanted) == len(keys):
            for name, key in zip(wanted, keys, strict=True):
                named[f"{module}.{name}", key[1]] = matrices[key]
        else:
            problems.append(f"{module}: {len(keys)} pairs of matrices, target_parameters names {len(wanted)} of it")
    return named, problems


def _low_rank(
    module: str, is_embedding: bool, pair: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> LowRank | str:
    """The change, or what is wrong with its matrices."""
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None:
        return f"its {'A' if a is None else 'B'} matrix is missing"
    shapes = f"A {list(a.shape)}, B {list(b.shape)}"
    if len(a.shape) != 2 or len(b.shape) != 2:
        hint = "; LoRA on a convolution is not supported" if len(a.shape) > 2 else ""
        return f"{shapes}: expected two matrices{hint}"
    if a.shape[0] != b.shape[1]:
        return f"{shapes}: A's rows and B's columns differ"
    is_parameter = _OF_EXPERTS.search(module) is not None
    rank = _chosen(config.get("rank_pattern"), module, config["r"])
    if a.shape[0] != rank and not (is_parameter and a.shape[0] % rank == 0):
        return f"{shapes}: {CONFIG} says rank {rank}"
    if a.dtype not in READABLE or b.dtype not in READABLE:
        return f"data types {a.dtype} and {b.dtype}, expected {', '.join(READABLE)}"
    alpha = _chosen(config.get("alpha_pattern"), module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    transposed = _is_transposed(config) if is_parameter else False
    return LowRank(module.removesuffix(".weight"), a, b, scale, is_embedding, a.shape[0] // rank, transposed)


def _is_transposed(config: Mapping[str, Any]) -> bool | None:
    """What the version of PEFT says about experts' factors; None where none is stated."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.get("peft_version") or ""))
    return (int(match[1]), int(match[2])) < _FACTORS_SWAPPED_SINCE if match else None
