"""`inspect`: what a source holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketquant.cli.options import Json, Source
from pocketquant.cli.planning import describe_tensor, tensor_cells
from pocketquant.cli.screen import print_json, print_lines, print_table

if TYPE_CHECKING:
    from pocketquant.model import Model, Value


def inspect(source: Source, json: Json = False) -> None:
    """List metadata and tensors of a GGUF or a checkpoint."""
    from pocketquant.convert.sources import names_gguf
    from pocketquant.formats import FORMATS

    if names_gguf(source) and _inspect_other(Path(source), json=json):
        return
    model = open_to_look(source)
    entries = [
        describe_tensor(tensor, tensor.dtype, tensor.n_rows * FORMATS[tensor.dtype].row_bytes(tensor.n_cols))
        for tensor in model.tensors
    ]
    sizes = _file_sizes(source)
    _show(model.architecture, sizes, model.notes, model.metadata, entries, json=json)


def open_to_look(source: str) -> Model:
    """Opens a source of which nothing is written: a GGUF's metadata may be as broken as it likes."""
    from pocketquant.convert import open_model
    from pocketquant.convert.chat_template import with_chat_template
    from pocketquant.convert.sources import names_gguf
    from pocketquant.gguf_file.opening import open_gguf

    if names_gguf(source):
        return with_chat_template(open_gguf(source), None, refuse=False)
    return open_model(source)


def _inspect_other(path: Path, *, json: bool) -> bool:
    """Shows an adapter or an importance matrix, and says what it is; False for what claims to be a model."""
    from pocketquant.gguf_file.reading import OTHER_KINDS, read_header

    header = read_header(path)
    stated = {key: header.metadata.get(f"general.{key}") for key in ("type", "architecture")}
    kind, architecture = (str(value.value) if value else "" for value in stated.values())
    if kind not in OTHER_KINDS:
        return False
    entries = [
        {
            "name": tensor.name,
            "role": kind,
            "shape": list(tensor.shape),
            "type": tensor.format.name,
            "nbytes": tensor.nbytes,
        }
        for tensor in header.tensors
    ]
    notes = (f"{OTHER_KINDS[kind]}, no model",)
    _show(architecture or kind, [path.stat().st_size], notes, header.metadata, entries, json=json)
    return True


def _show(
    architecture: str,
    sizes: Sequence[int],
    notes: Sequence[str],
    metadata: Mapping[str, Value],
    entries: Sequence[dict[str, Any]],
    *,
    json: bool,
) -> None:
    if json:
        print_json(
            {
                "architecture": architecture,
                "file_bytes": sum(sizes),
                "notes": list(notes),
                "metadata": {key: shortened(value.value) for key, value in metadata.items()},
                "tensors": entries,
            }
        )
        return
    print_table(
        ["key", "type", "value"],
        [[key, value.kind, str(shortened(value.value))[:100]] for key, value in metadata.items()],
    )
    print()
    print_table(["tensor", "role", "shape", "type", "bytes"], [tensor_cells(entry) for entry in entries])
    print_lines(f"\n{sum(sizes):,} bytes in {len(sizes)} file(s), {len(entries)} tensors of {architecture}")
    for note in notes:
        print_lines(f"note: {note}")


def _file_sizes(source: str) -> list[int]:
    """Bytes of each file that holds weights."""
    from pocketquant.convert.sources import names_gguf, open_snapshot
    from pocketquant.gguf_file.reading import read_shards

    if names_gguf(source):
        return [file.stat().st_size for file, _ in read_shards(Path(source))]
    with open_snapshot(source) as snapshot:
        return [file.size for file in snapshot.weights.values()]


def shortened(value: Any) -> Any:
    """A metadata value with long lists cut: nobody reads 248,320 tokens."""
    if isinstance(value, list) and len(value) > 16:
        return {"count": len(value), "first": value[:4]}
    return value
