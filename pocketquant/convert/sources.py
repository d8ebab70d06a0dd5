"""Finds out what a source is and opens it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pocketquant.architectures.qwen35_vision import QWEN35_VISION
from pocketquant.convert.adapter import open_adapter
from pocketquant.convert.chat_template import with_chat_template
from pocketquant.convert.checkpoint import open_checkpoint, open_mtp
from pocketquant.convert.gguf_source import open_gguf_source
from pocketquant.convert.mtp import MtpMode
from pocketquant.convert.snapshot import Snapshot, local_snapshot
from pocketquant.convert.vision import open_vision
from pocketquant.errors import SourceError
from pocketquant.files.small import kind_of
from pocketquant.gguf_file.reading import read_shards
from pocketquant.model import Model, Value

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_REPOSITORY = re.compile(rf"(?:(hf|ms)://)?({_PART}/{_PART})(?:@([\w./+-]{{1,200}}))?")


@dataclass(frozen=True)
class Repository:
    """A repository on a hub: `hub` is "hf" for Hugging Face, "ms" for ModelScope."""

    hub: str
    name: str
    revision: str | None


@dataclass(frozen=True)
class Parts:
    """What a source holds, each a file of its own: the model, its vision tower, its multi-token-prediction block."""

    model: Model
    vision: Model | None = None
    mtp: Model | None = None


def open_model(
    source: Path | str,
    *,
    chat_template: Path | str | None = None,
    keep_source: Path | str | None = None,
    adapter: Path | str | None = None,
    mtp: MtpMode = "sidecar",
) -> Model:
    """Opens the model of a GGUF file or of a checkpoint; reads no weights.

    Args:
        source: GGUF file, checkpoint folder, one `.safetensors` file beside its config.json, `hf://org/name@revision`,
            `ms://org/name@revision`, or `org/name@revision`, which means Hugging Face where no such path exists. A
            `Path` is always local.
        chat_template: a file to take in place of the source's chat templates.
        keep_source: a folder to download a repository into, as `keep_source/name`; None reads only what is needed.
        adapter: the folder of a LoRA adapter, PEFT's or mlx-lm's, to merge into a checkpoint.
        mtp: "embed" takes a multi-token-prediction block in; otherwise it is left out.

    Raises:
        SourceError, ArchitectureError, TokenizerError: see `open_gguf` and `open_checkpoint`.
        OutputError: no room for `keep_source`.
    """
    return open_parts(
        source, chat_template=chat_template, keep_source=keep_source, adapter=adapter, mtp=mtp, only_model=True
    ).model


def open_parts(
    source: Path | str,
    *,
    chat_template: Path | str | None = None,
    keep_source: Path | str | None = None,
    adapter: Path | str | None = None,
    mtp: MtpMode = "sidecar",
    with_vision: bool = True,
    only_model: bool = False,
) -> Parts:
    """Opens everything that a source holds; arguments and errors as `open_model`.

    Args:
        with_vision: open the vision tower; without it, one that cannot be converted stops nothing.
        only_model: open neither vision tower nor sidecar.
    """
    if is_gguf := names_gguf(source):
        path = Path(source)
        if adapter is not None:
            raise SourceError(f"{path}: an adapter is merged into a checkpoint, not into a GGUF; give the checkpoint")
        parts = Parts(open_gguf_source(path))
    else:
        merged = None if adapter is None else open_adapter(adapter)
        with open_snapshot(source, keep_source) as snapshot:
            parts = Parts(
                open_checkpoint(snapshot, mtp=mtp, adapter=merged),
                open_vision(snapshot) if with_vision and not only_model else None,
                open_mtp(snapshot, adapter=merged) if mtp == "sidecar" and not only_model else None,
            )
    return replace(parts, model=with_chat_template(parts.model, chat_template, refuse=not is_gguf))


def open_counterpart(file: Path | str, source: Path | str) -> Model:
    """Opens the part of a source that a GGUF was made from: the model, its vision tower or its prediction block.

    Args:
        file: the GGUF; the first one if it is split.
        source: as for `open_model`.

    Raises:
        SourceError: the source has no such part; or as `open_model`.
    """
    shards = read_shards(file)
    metadata = shards[0][1].metadata
    name = str(metadata.get("general.architecture", Value("str", "")).value)
    holds_trunk = any(tensor.name.startswith("blk.0.") for _, header in shards for tensor in header.tensors)
    holds_block = bool(metadata.get(f"{name}.nextn_predict_layers", Value("u32", 0)).value)
    if names_gguf(source) or (name != QWEN35_VISION.name and not holds_block):
        return open_model(source)
    with open_snapshot(source) as snapshot:
        if name == QWEN35_VISION.name:
            part, what = open_vision(snapshot), "vision tower"
        elif holds_trunk:
            part, what = open_checkpoint(snapshot, mtp="embed"), ""
        else:
            part, what = open_mtp(snapshot), "multi-token-prediction block"
    if part is None:
        raise SourceError(f"{source}: has no {what}, and {file} holds one; give the checkpoint it was made from")
    return part


def names_gguf(source: Path | str) -> bool:
    """Whether a source is to be read as a GGUF: any file that is not a checkpoint's safetensors."""
    path = Path(source)
    return kind_of(path) == "file" and path.suffix != ".safetensors"


@contextmanager
def open_snapshot(source: Path | str, keep_source: Path | str | None = None) -> Iterator[Snapshot]:
    """The files of a checkpoint, local or on a hub, for as long as the block runs; see `open_model`."""
    repository = find_repository(source)
    if repository is None:
        yield local_snapshot(Path(source))
        return
    kept = None if keep_source is None else Path(keep_source)
    if repository.hub == "ms":
        from pocketquant.convert.modelscope import modelscope_snapshot

        opened = modelscope_snapshot(repository.name, repository.revision, kept)
    else:
        from pocketquant.convert.hub import hub_snapshot

        opened = hub_snapshot(repository.name, repository.revision, kept)
    with opened as snapshot:
        yield snapshot


def find_repository(source: Path | str) -> Repository | None:
    """The repository that a source names; None if it is a path.

    Raises:
        SourceError: it starts as an address but names no repository.
    """
    if isinstance(source, Path) or kind_of(source):
        return None
    match = _REPOSITORY.fullmatch(source)
    if match:
        return Repository(match[1] or "hf", match[2], match[3])
    if "://" in source:
        raise SourceError(
            f"{source}: names no repository; give hf://org/name or ms://org/name, with @revision if not the newest"
        )
    return None
