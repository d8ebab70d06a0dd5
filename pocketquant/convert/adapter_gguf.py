"""A PEFT LoRA adapter -> a GGUF that llama.cpp loads beside the base model.

For every changed weight two tensors, `NAME.lora_a` [rank, cols] and `NAME.lora_b` [rows, rank]; llama.cpp adds
alpha / rank * B @ (A @ x), with one alpha for the file and the rank of each pair. Where the base model's rows are in
another order than the checkpoint's, so are B's, and where its columns are, A's. An embedding's A is transposed,
[rows, rank], since it is looked up like the embedding. Experts have a pair of stacks (`adapter_experts`).
Source: llama.cpp `src/llama-adapter.cpp`, `src/llama-adapter.h`, `src/llama-graph.cpp`,
`convert_lora_to_gguf.py` (b10359).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketquant.architectures import architecture_named
from pocketquant.architectures.table import MODEL, Order, TensorRule
from pocketquant.convert.adapter import Adapter, LowRank
from pocketquant.convert.adapter_experts import expert_pairs, is_of_experts
from pocketquant.convert.adapter_merge import HEAD, matrices
from pocketquant.convert.adapter_pieces import without_prefix
from pocketquant.convert.quantized.numbers import floats
from pocketquant.convert.quantized.tensor import Reads
from pocketquant.convert.safetensors import StoredTensor
from pocketquant.errors import SourceError, listing
from pocketquant.formats import FORMATS, F32Array
from pocketquant.gguf_file.header import encode_header
from pocketquant.model import Model, Plan, PlannedTensor, Role, Tensor, Value, padded

_QUANTIZATION_VERSION = 2
_COMPARE_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class AdapterRows:
    """One of the two matrices in GGUF's order; a `RowSource`.

    Attributes:
        change: the pair.
        is_a: which of the two.
        order: of B's rows or of A's columns, None as they are.
        factor: what B is multiplied by.
        reads: keeps the matrices between chunks.
    """

    change: LowRank
    is_a: bool
    order: npt.NDArray[np.int64] | None
    factor: float
    reads: Reads

    def stored(self, start: int, stop: int) -> None:
        """None: rows are always computed."""
        return

    def rows(self, start: int, stop: int) -> F32Array:
        """Rows [start, stop) as f32[n, n_cols]; SourceError if a number is not finite."""
        left, right = matrices(self.change, self.reads, 0, self.change.shape[0])
        a, b = (left, right.T) if self.change.is_embedding else (right, left)
        if self.is_a:
            return np.ascontiguousarray(a[start:stop] if self.order is None else a[start:stop, self.order])
        rows = b[start:stop] if self.order is None else b[self.order[start:stop]]
        return np.ascontiguousarray(rows if self.factor == 1.0 else rows.astype(np.float64) * self.factor, np.float32)


def plan_adapter(adapter: Adapter, base: Model, type_name: str = "f32") -> Plan:
    """Decides the file; write it with `pocketquant.gguf_file.writing.write`.

    Args:
        adapter: from `open_adapter`.
        base: the model that it belongs to, from its checkpoint or a GGUF of it.
        type_name: f32, f16 or bf16.

    Raises:
        SourceError: modules that the base model does not have, of another shape, or that llama.cpp cannot add an
            adapter to (all listed).
    """
    fitting: list[tuple[LowRank, Tensor, TensorRule]] = []
    of_experts = [change for change in adapter.changes if is_of_experts(change)]
    pairs, problems = expert_pairs(of_experts, base)
    for change in adapter.changes:
        if change in of_experts:
            continue
        found = _place(change, base)
        if isinstance(found, str):
            problems.append(f"{change.module}: {found}")
        else:
            fitting.append((change, *found))
    problems += [f"{module}: was trained whole, no LoRA matrices" for module in adapter.trained_weights]
    problems += [
        f"{module}: brings a base weight along that differs from the base model's"
        for module, weight in adapter.base_weights.items()
        if not _is_same(weight, module, base)
    ]
    if problems:
        raise SourceError(
            f"adapter {adapter.name}: cannot be a GGUF adapter of this base model; if the base model is the right one, "
            f"merge it instead (convert or quantize with --adapter):\n{listing(problems)}"
        )
    # one alpha for the file: the one that leaves most matrices as they are
    alphas = Counter([change.scale * change.rank for change, _, _ in fitting] + [pair.alpha for pair in pairs])
    alpha = alphas.most_common(1)[0][0]
    reads, planned, offset, kind = Reads(), list[PlannedTensor](), 0, FORMATS[type_name.upper()]
    tensors = [
        tensor
        for change, target, rule in fitting
        for tensor in _pair(change, target, rule, base, change.scale * change.rank / alpha, reads)
    ]
    for tensor in [*tensors, *(tensor for pair in pairs for tensor in pair.tensors(alpha, reads))]:
        nbytes = tensor.n_rows * kind.row_bytes(tensor.n_cols)
        planned.append(PlannedTensor(tensor, kind, offset, nbytes, "number format of the file"))
        offset = padded(offset + nbytes)
    metadata = _metadata(adapter, base, alpha)
    header = encode_header(metadata, planned)
    return Plan(metadata, tuple(planned), header, {}, files=(*adapter.files, *base.files))


def _place(change: LowRank, base: Model) -> tuple[Tensor, TensorRule] | str:
    """The base model's tensor and its rule, or why the change has no place."""
    inside = without_prefix(change.module)
    match = re.fullmatch(r"layers\.(\d{1,5})\.(.+)", inside)
    source = f"{match[2] if match else inside}.weight"
    rules = [
        rule
        for rule in architecture_named(base.architecture).tensors
        if rule.source == source and (rule.where == MODEL) == (match is None)
    ]
    if base.is_tied and any(rule.role in (Role.EMBED, Role.HEAD) for rule in rules):
        return "embedding and head are tied, where llama.cpp cannot change one of them"
    names = [f"blk.{int(match[1])}.{rule.target}" if match else rule.target for rule in rules]
    found = [
        (tensor, rule)
        for name, rule in zip(names, rules, strict=True)
        for tensor in base.tensors
        if tensor.name == name
    ]
    if not found:
        return "the base model has no such weight, or it is of the vision tower or the MTP block"
    target, rule = found[0]
    if change.shape != target.shape or rule.each is not None:
        return f"{list(change.shape)}, in the base model {list(target.shape)}"
    if change.is_embedding != (target.role is Role.EMBED):
        return "only the embedding has matrices of an embedding"
    return target, rule


def _is_same(weight: StoredTensor, module: str, base: Model) -> bool:
    """Whether a weight saved along is the base model's; PEFT saves the embedding with adapters that change it."""
    names = {"embed_tokens": Role.EMBED, HEAD: Role.HEAD}
    role = names.get(without_prefix(module))
    if role is Role.HEAD and base.is_tied:
        role = Role.EMBED
    tensor = next((tensor for tensor in base.tensors if tensor.role is role), None)
    if tensor is None or tensor.shape != weight.shape:
        return False
    step = max(1, _COMPARE_WEIGHTS // tensor.n_cols)
    chunks = ((start, min(start + step, tensor.n_rows)) for start in range(0, tensor.n_rows, step))
    return all(np.array_equal(tensor.rows(*chunk), floats(weight.words(*chunk), weight.dtype)) for chunk in chunks)


def _pair(
    change: LowRank, target: Tensor, rule: TensorRule, base: Model, factor: float, reads: Reads
) -> tuple[Tensor, Tensor]:
    def order(wanted: Order | None) -> npt.NDArray[np.int64] | None:
        return None if wanted is None else wanted(base.sizes)

    n_rows, n_cols = change.shape
    a_shape = (n_rows, change.rank) if change.is_embedding else (change.rank, n_cols)
    b_shape = (n_cols, change.rank) if change.is_embedding else (n_rows, change.rank)
    a = AdapterRows(change, True, order(rule.cols), 1.0, reads)
    b = AdapterRows(change, False, order(rule.rows), factor, reads)
    return (
        Tensor(f"{target.name}.lora_a", target.role, target.layer, a_shape, change.a.dtype, a),
        Tensor(f"{target.name}.lora_b", target.role, target.layer, b_shape, change.b.dtype, b),
    )


def _metadata(adapter: Adapter, base: Model, alpha: float) -> dict[str, Value]:
    from pocketquant import __version__

    metadata = {
        "general.architecture": Value("str", base.architecture),
        "general.type": Value("str", "adapter"),
        "adapter.type": Value("str", "lora"),
        "general.name": Value("str", adapter.name),
    }
    name = base.metadata.get("general.name")
    if name is not None:
        metadata["general.base_model.count"] = Value("u32", 1)
        metadata["general.base_model.0.name"] = name
    return {
        **metadata,
        "adapter.lora.alpha": Value("f32", alpha),
        "general.quantization_version": Value("u32", _QUANTIZATION_VERSION),
        "pocketquant.version": Value("str", __version__),
    }
