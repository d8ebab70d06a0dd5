"""A vision tower beside a model: its weights, and the buffer in which it looks at an image.

llama.cpp sets the buffer aside when it loads the tower, for an image of 1,472 x 1,472 pixels; a larger image makes it
grow. Without flash attention the scores of every patch with every other are written down, and the buffer becomes
larger than most towers.

Source: tools/mtmd/models/qwen3vl.cpp, `build_inp_with_temporal_merge` of tools/mtmd/models/qwen2vl.cpp,
tools/mtmd/clip.cpp and `ggml_conv_2d` of ggml/src/ggml.c, of the llama.cpp in llama-cpp-python 0.3.36, for a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pocketquant.errors import ArchitectureError
from pocketquant.fit.graph import F16_BYTES, F32_BYTES, I32_BYTES, Graph, Node, in_place, new_input, op
from pocketquant.gguf_file.reading import read_header
from pocketquant.model import Plan

RESERVED_SIDE = 1472
"""Pixels of a side of the image that llama.cpp sets room aside for: 46 x 46 tokens of 32 x 32 pixels."""
_PATCH, _MERGE = 16, 4
_COLOURS, _FRAMES = 3, 2
_KEYS = (
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "projection_dim",
    "image_size",
)


@dataclass(frozen=True)
class Tower:
    """What memory depends on of an mmproj file.

    Attributes:
        nbytes: of its weights.
        width, depth, n_ff, n_head: of the tower.
        out: columns of what it hands to the model.
        grid: learned positions of a side.
        item_bytes: of the patches as they are convolved: 4 for BF16 weights, else 2.
    """

    nbytes: int
    width: int
    depth: int
    n_ff: int
    n_head: int
    out: int
    grid: int
    item_bytes: int = F16_BYTES


def tower_of(source: Plan | Path) -> Tower:
    """What memory depends on, of a planned mmproj file or of a GGUF.

    Raises:
        SourceError: a broken file.
        ArchitectureError: not a vision tower of this family.
    """
    if isinstance(source, Plan):
        metadata = source.metadata
        tensors = [(item.tensor.name, item.format.name, item.nbytes) for item in source.tensors]
    else:
        header = read_header(source)
        metadata = header.metadata
        tensors = [(item.name, item.format.name, item.nbytes) for item in header.tensors]
    found = [metadata.get(f"clip.vision.{key}") for key in _KEYS]
    numbers = [value.value for value in found if value is not None and type(value.value) is int and value.value > 0]
    if len(numbers) < len(_KEYS):
        raise ArchitectureError(f"{source if isinstance(source, Path) else 'the plan'}: no vision tower of this family")
    width, depth, n_ff, n_head, out, image_size = numbers
    kinds = {kind for name, kind, _ in tensors if name.startswith("v.patch_embd.weight")}
    item_bytes = F32_BYTES if "BF16" in kinds else F16_BYTES
    nbytes = sum(size for *_, size in tensors)
    return Tower(nbytes, width, depth, n_ff, n_head, out, image_size // _PATCH, item_bytes)


def vision_buffer_bytes(tower: Tower, side: int = RESERVED_SIDE, *, flash_attention: bool = True) -> int:
    """What llama.cpp logs as the tower's "compute buffer size", for an image of `side` x `side` pixels."""
    return _Build(tower, side, flash_attention).graph_of().buffer_bytes()


class _Build:
    """Builds the graph of qwen3vl.cpp."""

    def __init__(self, tower: Tower, side: int, flash_attention: bool) -> None:
        self.tower, self.flash_attention = tower, flash_attention
        self.side, self.per_side = side, side // _PATCH
        self.n = self.per_side**2
        self.graph = Graph()
        self.positions = new_input(4 * self.n, item_bytes=I32_BYTES)

    def graph_of(self) -> Graph:
        tower, n = self.tower, self.n
        patches = self.merged(self.patches())
        current = in_place(in_place(patches), self.merged(self.learned_positions()))  # bias, positions
        for _ in range(tower.depth):
            current = in_place(self.attention(self.norm(current)), current)
            current = in_place(current, self.feed_forward(self.norm(current), tower.n_ff, tower.width, n))
        merged = self.norm(current).view(tower.width * _MERGE, n // _MERGE)
        self.graph.expand(self.feed_forward(merged, tower.width * _MERGE, tower.out, n // _MERGE))
        return self.graph

    def norm(self, current: Node) -> Node:
        """Layer norm, weights, bias; the norm itself is not computed in place."""
        return in_place(in_place(op(current.shape, current)))

    def patches(self) -> Node:
        """Two convolutions of the same image, one for each frame, added."""
        raw = new_input(self.side, self.side, _COLOURS)
        frames = []
        for _ in range(_FRAMES):
            columns = op((_COLOURS * _PATCH**2, self.n), raw, item_bytes=self.tower.item_bytes)
            product = op((self.n, self.tower.width), columns.view(_COLOURS * _PATCH**2, self.n))
            frames.append(op((self.n, self.tower.width), product.view(self.n, self.tower.width)))
        return in_place(frames[0], frames[1])

    def merged(self, current: Node) -> Node:
        """Patches in the order of 2 x 2 squares: copied twice."""
        shape = (self.tower.width, self.n)
        return op(shape, op(shape, current.view(*shape, strided=True)).view(*shape, strided=True))

    def learned_positions(self) -> Node:
        if self.per_side == self.tower.grid:
            return Node((self.tower.width, self.n), is_external=True)
        table = Node((self.tower.width, self.tower.grid**2), is_external=True)
        resized = op((self.n, self.tower.width), table)
        return op((self.tower.width, self.n), resized.view(self.tower.width, self.n, strided=True))

    def attention(self, normed: Node) -> Node:
        tower, n = self.tower, self.n
        head = tower.width // tower.n_head
        qkv = in_place(op((3 * tower.width, n), normed))
        views = [qkv.view(head, tower.n_head, n, strided=True) for _ in range(3)]
        q, k = (in_place(view, self.positions) for view in views[:2])
        for node in (q, k, views[2]):
            self.graph.expand(node)
        q, k = (node.view(head, n, tower.n_head, strided=True) for node in (q, k))
        v = views[2].view(head, n, tower.n_head, strided=True)
        if self.flash_attention:
            k, v = (op((head, n, tower.n_head), node, item_bytes=F16_BYTES) for node in (k, v))
            mixed = op((head, tower.n_head, n), q, k, v).view(tower.width, n)
        else:
            v = op((n, head, tower.n_head), v)
            scores = in_place(op((n, n, tower.n_head), k, q))
            weighted = op((head, n, tower.n_head), v, scores)
            mixed = op((tower.width, n), weighted.view(head, tower.n_head, n, strided=True))
        return in_place(op((tower.width, n), mixed))

    def feed_forward(self, current: Node, width: int, out: int, n: int) -> Node:
        hidden = in_place(in_place(op((width, n), current)))  # bias, GELU
        return in_place(op((out, n), hidden))
