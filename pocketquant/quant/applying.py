"""Model + Recipe -> Plan: every tensor's format by the recipe's rules, every offset, the finished header."""

from __future__ import annotations

from collections.abc import Mapping

from pocketquant import __version__
from pocketquant.calibration.importance import Importance, check_importance, unfused
from pocketquant.errors import RecipeError, listing
from pocketquant.formats import FORMATS, QuantFormat, unwritten_advice
from pocketquant.gguf_file.header import encode_header
from pocketquant.model import Model, Plan, PlannedTensor, Tensor, Value, padded
from pocketquant.quant.recipe import Recipe, choose_formats

QUANTIZATION_VERSION = 2
"""GGML's version of the block layouts (GGML_QNT_VERSION); llama.cpp writes it into every file, quantized or not."""


def apply_recipe(
    model: Model,
    recipe: Recipe,
    importance: Importance | None = None,
    metadata_extra: Mapping[str, Value] | None = None,
) -> Plan:
    """Lays an output file out, each tensor rounded by its format's own encoder.

    Args:
        model: the opened source.
        recipe: which format each tensor gets.
        importance: weights of the squared rounding error, from `read_importance`.
        metadata_extra: keys to add to the model's own, or to put in their place.

    Returns:
        Every tensor's format, size, offset and reason, and the finished header.

    Raises:
        RecipeError: the importance matrix is of another model, the recipe asks for formats that are only read, or the
            source is quantized already and would have to be rounded a second time.
    """
    if importance is not None:
        importance = unfused(importance, model)
        check_importance(importance, model)
    choices = choose_formats(model, recipe, importance is not None)
    _refuse_second_rounding(choices)
    _refuse_unwritten(choices)

    planned: list[PlannedTensor] = []
    offset = 0
    for tensor, format, reason in choices:
        if importance is not None and format.block_len > 1 and tensor.name not in importance.weights:
            reason += "; no importance for it in the matrix"
        nbytes = tensor.n_rows * format.row_bytes(tensor.n_cols)
        planned.append(PlannedTensor(tensor, format, offset, nbytes, reason))
        offset = padded(offset + nbytes)

    quantized = {item.tensor.name for item in planned if item.format.block_len > 1}
    used = {name: array for name, array in importance.weights.items() if name in quantized} if importance else {}
    metadata = dict(model.metadata)
    metadata["general.quantization_version"] = Value("u32", QUANTIZATION_VERSION)
    metadata["general.file_type"] = Value("u32", recipe.file_type)
    metadata["pocketquant.version"] = Value("str", __version__)
    metadata["pocketquant.recipe"] = Value("str", recipe.name)
    if importance is not None and used:
        metadata.update(_describe_importance(importance))
    metadata.update(metadata_extra or {})
    return Plan(
        metadata, tuple(planned), encode_header(metadata, planned), used, files=model.files, origin=model.origin
    )


def _refuse_second_rounding(choices: list[tuple[Tensor, QuantFormat, str]]) -> None:
    # F32 holds every format's values exactly, so a quantized tensor may become F32, but nothing else.
    offenders = [
        f"{tensor.name}: stored as {tensor.dtype}, would become {format.name}"
        for tensor, format, _ in choices
        if tensor.dtype in FORMATS and FORMATS[tensor.dtype].block_len > 1 and format.name not in (tensor.dtype, "F32")
    ]
    if offenders:
        raise RecipeError(
            f"{len(offenders)} tensor(s) of the source are quantized already; rounding them twice loses quality.\n"
            f"{listing(offenders)}\nStart from the checkpoint or from a GGUF in F32, F16 or BF16."
        )


def _refuse_unwritten(choices: list[tuple[Tensor, QuantFormat, str]]) -> None:
    # A tensor that is stored so already is copied.
    offenders = [
        f"{tensor.name}: would become {format.name} ({reason})"
        for tensor, format, reason in choices
        if not format.written and format.name != tensor.dtype
    ]
    if offenders:
        raise RecipeError(
            f"{len(offenders)} tensor(s) would become formats that can be read but not written; {unwritten_advice()}.\n"
            f"{listing(offenders)}"
        )


def _describe_importance(importance: Importance) -> dict[str, Value]:
    """The keys that llama.cpp's llama-quantize writes (tools/quantize/quantize.cpp, b10359)."""
    described = {"quantize.imatrix.file": Value("str", importance.file)}
    if importance.datasets:
        described["quantize.imatrix.dataset"] = Value("str", importance.datasets[0])
    described["quantize.imatrix.entries_count"] = Value("u32", len(importance.weights))
    if importance.n_chunks:
        described["quantize.imatrix.chunks_count"] = Value("u32", importance.n_chunks)
    return described
