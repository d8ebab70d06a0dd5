"""The vision tower of a checkpoint -> a `Model` of its own, which becomes the `mmproj-*.gguf` beside the text model.

As for the text model, all names, types and shapes are checked before any weight is read: a tower is converted whole or
refused, never in part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.architectures.qwen35_vision import PREFIXES, QWEN35_VISION
from pocketquant.architectures.table import BLOCK, Sizes, TensorRule, shape_of
from pocketquant.convert.description import describe_folder
from pocketquant.convert.kinds import read_config
from pocketquant.convert.mapping import READABLE
from pocketquant.convert.metadata import model_metadata
from pocketquant.convert.quantized import DequantizedTensor, dequantize_table
from pocketquant.convert.rows import CheckpointRows
from pocketquant.convert.safetensors import CheckpointTensor, RangeFile
from pocketquant.convert.snapshot import Snapshot, local_snapshot
from pocketquant.convert.tensor_table import choose_weights, read_tensor_table
from pocketquant.errors import ArchitectureError, SourceError, listing
from pocketquant.files.small import is_present, kind_of, read_object
from pocketquant.gguf_file.reading import is_gguf
from pocketquant.model import Model, Tensor, Value

_LARGEST_F32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class KernelFrame:
    """The kernel for one frame, out of a kernel [n_embd, n_channel, n_frame, n_patch, n_patch] for all of them.

    Stands for a stored tensor [n_embd, n_channel, n_patch, n_patch]. Reads what lies between, too: one request instead
    of thousands for 16 lines each. MLX programs keep the channels last, [n_embd, n_frame, n_patch, n_patch, n_channel]
    (mlx-vlm 0.7.10, `models/qwen3_5/qwen3_5.py` sanitize).
    """

    kernel: CheckpointTensor
    frame: int
    channels_last: bool = False

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def file(self) -> RangeFile:
        return self.kernel.file

    @property
    def dtype(self) -> str:
        return self.kernel.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        n_embd, n_channel, _, *patch = self._dimensions
        return (n_embd, n_channel, *patch)

    @property
    def _dimensions(self) -> tuple[int, ...]:
        if not self.channels_last:
            return self.kernel.shape
        n_embd, n_frame, height, width, n_channel = self.kernel.shape
        return n_embd, n_channel, n_frame, height, width

    @property
    def nbytes(self) -> int:
        return self.kernel.nbytes // self._dimensions[2]

    def words(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Lines [start, stop) of the frame, seen as [n_embd * n_channel * n_patch, n_patch]."""
        n_channel, n_frame, height, width = self._dimensions[1:]
        if self.channels_last:
            n_lines, n_pixels = n_channel * height, n_frame * height * width
            first, last = start // n_lines, -(-stop // n_lines)
            words = self.kernel.words(first * n_pixels, last * n_pixels)
            frames = words.reshape(last - first, n_frame, height, width, n_channel)[:, self.frame]
            return frames.transpose(0, 3, 1, 2).reshape(-1, width)[start - first * n_lines : stop - first * n_lines]
        first, last = start // height, -(-stop // height)
        words = self.kernel.words(first * n_frame * height, last * n_frame * height)
        lines = words.reshape(last - first, n_frame, height, width)[:, self.frame].reshape(-1, width)
        return lines[start - first * height : stop - first * height]


def open_vision(source: Path | str | Snapshot) -> Model | None:
    """Opens the vision tower of a checkpoint; reads no weights.

    Returns:
        The tower as a model of architecture `clip`, or None where the checkpoint holds no tensor of one: a text-only
        fine-tune, whatever class its config.json names. A GGUF file is one model and has no tower beside it: None.

    Raises:
        SourceError: files missing or broken, among them preprocessor_config.json, which says how pixels are scaled.
        ArchitectureError: tensors missing, unknown or of another shape or type (all listed), or a tower that llama.cpp
            would compute differently.
    """
    if not isinstance(source, Snapshot):
        path = Path(source)
        if kind_of(path) == "file" and is_gguf(path):
            return None
        source = local_snapshot(path)
    folder = source.folder
    config = read_config(folder)
    table = read_tensor_table(source, choose_weights(source, config))
    prefix = _prefix_of(folder, table)
    if prefix is None:
        return None
    part = {name: tensor for name, tensor in table.items() if name.startswith(prefix)}
    if "vision_config" not in config:
        raise ArchitectureError(
            f"{folder}: {len(part)} tensors under {prefix!r}, and config.json has no vision_config; add the one of the "
            "model this was made from"
        )
    notes: list[str] = []
    stored = dequantize_table(part, config, folder, notes)
    if not any(isinstance(tensor, DequantizedTensor) for tensor in stored.values()):
        notes.clear()  # the text model alone is quantized, as is usual: that is its own note
    vision_config = _object(config["vision_config"], f"{folder / 'config.json'} vision_config")
    sizes = QWEN35_VISION.read_sizes(vision_config)
    _check_text_width(folder, config, sizes)
    tensors = _map_tensors(sizes, stored, prefix)
    if any(isinstance(rows, KernelFrame) and rows.channels_last for rows in map(_stored_of, tensors)):
        notes.append("vision tower saved by MLX (its kernel's channels are last): put back in their place")
    settings = {**vision_config, **read_pixel_scaling(folder)}
    described = describe_folder(folder, sum(prod(tensor.shape) for tensor in tensors), notes)
    metadata = model_metadata(QWEN35_VISION, settings, sizes, described) | {"general.type": Value("str", "mmproj")}
    return Model(QWEN35_VISION.name, metadata, tensors, sizes, tuple(notes), source.files, source.origin)


def read_pixel_scaling(folder: Path) -> dict[str, list[float]]:
    """`image_mean` and `image_std`, three numbers each, for pixels scaled to [0, 1].

    They stand in preprocessor_config.json or, as newer versions of transformers save them, in processor_config.json,
    at the top or under `image_processor`; the latter file wins, as in llama.cpp's converter.

    Raises:
        SourceError: found in neither file, or no numbers that can be scaled with.
    """
    found: dict[str, Any] = {}
    where: dict[str, str] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if is_present(folder / name):
            settings = read_object(folder / name)
            inner = settings.get("image_processor")
            settings |= {} if inner is None else _object(inner, f"{folder / name} image_processor")
            found |= settings
            where |= dict.fromkeys(settings, f"{name}: ")
    problems = []
    for key in ("image_mean", "image_std"):
        values = found.get(key)
        if values is None:
            problems.append(f"{key}: missing")
        elif not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
            problems.append(f"{where[key]}{key}: {str(values)[:80]}, expected three numbers that f32 holds")
        elif key == "image_std" and min(values) <= 0:
            problems.append(f"{where[key]}{key}: {values}, expected positive numbers")
    factor = found.get("rescale_factor", 1 / 255)
    if not _is_number(factor) or abs(factor * 255 - 1) > 1e-3:
        problems.append(f"{where['rescale_factor']}rescale_factor: {str(factor)[:80]}, llama.cpp scales with 1/255")
    if problems:
        raise SourceError(
            f"{folder}: how images are scaled is not known, so the vision tower cannot be converted; copy "
            f"preprocessor_config.json from the model this was made from:\n{listing(problems)}"
        )
    return {key: [float(value) for value in found[key]] for key in ("image_mean", "image_std")}


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST_F32  # type: ignore[arg-type]


def _object(value: Any, where: Path | str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SourceError(f"{where}: no JSON object")
    return value


def _prefix_of(folder: Path, stored: Mapping[str, CheckpointTensor]) -> str | None:
    found = [prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in stored)]
    if len(found) > 1:
        raise ArchitectureError(f"{folder}: the checkpoint holds two vision towers, under the prefixes {found}")
    return found[0] if found else None


def _check_text_width(folder: Path, config: Mapping[str, Any], sizes: Sizes) -> None:
    text_config = config.get("text_config", config)
    width = text_config.get("hidden_size") if isinstance(text_config, dict) else None
    if width != sizes["n_text"]:
        raise ArchitectureError(
            f"{folder / 'config.json'}: the vision tower gives embeddings of {sizes['n_text']} numbers "
            f"(vision_config.out_hidden_size), the text model takes {width!r} (text_config.hidden_size); they are not "
            "of one model"
        )


def _expected(sizes: Sizes, prefix: str) -> Iterator[tuple[str, str, TensorRule, int | None]]:
    """(name in the checkpoint, name in GGUF, rule, block) of every tensor, in file order."""
    for rule in QWEN35_VISION.tensors:
        if rule.where != BLOCK:
            yield f"{prefix}{rule.source}", rule.target, rule, None
    for layer in range(sizes["n_layer"]):
        for rule in QWEN35_VISION.tensors:
            if rule.where == BLOCK:
                target = f"{QWEN35_VISION.blocks}.{layer}.{rule.target}"
                yield f"{prefix}blocks.{layer}.{rule.source}", target, rule, layer


def _map_tensors(sizes: Sizes, stored: Mapping[str, CheckpointTensor], prefix: str) -> tuple[Tensor, ...]:
    if sizes["n_layer"] > len(stored):
        raise ArchitectureError(
            f"config.json vision_config.depth: {sizes['n_layer']} blocks, and there are only {len(stored)} tensors "
            f"under {prefix!r}"
        )
    wanted = list(_expected(sizes, prefix))
    rules = {name: rule for name, _, rule, _ in wanted}  # the two frames of a patch are read from one tensor
    missing = [f"{name} {list(shape_of(rule, sizes))}" for name, rule in rules.items() if name not in stored]
    unknown = [f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in stored.items() if name not in rules]
    wrong = [
        f"{name}: {problem}"
        for name, rule in rules.items()
        if name in stored and (problem := _problem_of(stored[name], rule, sizes))
    ]
    parts = [
        (missing, f"tensors missing that vision_config's {sizes['n_layer']} blocks need"),
        (unknown, "tensors that no Qwen3.5 vision tower has"),
        (wrong, "tensors that do not fit vision_config"),
    ]
    message = "\n".join(f"{len(items)} {what}:\n{listing(items)}" for items, what in parts if items)
    if message:
        raise ArchitectureError(message)
    tensors = []
    for name, target, rule, layer in wanted:
        source = stored[name]
        if rule.half is not None:
            source = KernelFrame(source, rule.half, channels_last=source.shape != shape_of(rule, sizes))
        rows = CheckpointRows(source, source.shape, None, None, None)
        tensors.append(Tensor(target, rule.role, layer, source.shape, source.dtype, rows, keep_f32=rule.keep_f32))
    return tuple(tensors)


def _stored_of(tensor: Tensor) -> object:
    return tensor.source.stored_tensor if isinstance(tensor.source, CheckpointRows) else None


def _problem_of(tensor: CheckpointTensor, rule: TensorRule, sizes: Sizes) -> str:
    expected = shape_of(rule, sizes)
    if tensor.shape in (expected, _as_in_mlx(expected)):
        return "" if tensor.dtype in READABLE else f"data type {tensor.dtype}, expected {', '.join(READABLE)}"
    hint = ""
    if tensor.dtype in ("U8", "I8") and tensor.shape[-1:] == (1,):
        hint = ": this looks like a bitsandbytes 4-bit checkpoint"
    words = " ".join(f"{word}={size}" for word, size in zip(rule.shape.split(), expected, strict=True))
    return f"{tensor.dtype} {list(tensor.shape)}, expected [{words}]{hint}"


def _as_in_mlx(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel's shape with its channels last; other shapes as they are."""
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 5 else shape
