"""How large a buffer llama.cpp's graph allocator needs for a computation, without the computation.

A `Graph` is built as ggml builds one: operators become nodes in the order in which `expand` reaches them, weights and
caches take no room, and what an operator writes reuses memory that nothing reads any more. `buffer_bytes` walks the
nodes as the allocator does: the best-fitting free block, an operand's own memory where the operator may write in place.

Source: ggml/src/ggml-alloc.c (`ggml_gallocr_alloc_graph_impl`, `ggml_dyn_tallocr_alloc`, `ggml_op_can_inplace`) and
ggml/src/ggml.c (`ggml_visit_parents_graph`) of the llama.cpp in llama-cpp-python 0.3.36, for one CPU backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

F16_BYTES, F32_BYTES, I32_BYTES, I64_BYTES = 2, 4, 4, 8
_ALIGNMENT = 64
Shape = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A tensor of a graph.

    Attributes:
        shape: its dimensions, as ggml orders them; with `item_bytes` and `is_strided` they are its layout.
        sources: what it is computed from, in ggml's order.
        view_of: the tensor whose memory it shares; never itself a view.
        in_place: whether the operator may write over an operand of the same layout.
        is_output: read after the computation, so never freed.
        is_external: lies in another buffer: weights, caches, and views of them.
    """

    shape: Shape
    sources: tuple[Node, ...] = ()
    view_of: Node | None = None
    in_place: bool = False
    is_output: bool = False
    is_external: bool = False
    is_strided: bool = False
    item_bytes: int = F32_BYTES
    children: int = 0
    views: int = 0
    offset: int = -1

    @property
    def nbytes(self) -> int:
        """Bytes that the allocator sets aside."""
        return -(-prod(self.shape) * self.item_bytes // _ALIGNMENT) * _ALIGNMENT

    def lies_like(self, other: Node) -> bool:
        """Whether both have the same type, dimensions and strides."""
        strided = self.is_strided or other.is_strided
        return not strided and self.item_bytes == other.item_bytes and _squeezed(self.shape) == _squeezed(other.shape)

    def view(self, *shape: int, strided: bool = False) -> Node:
        """Another look at the same memory; `strided` if its rows do not follow each other."""
        root = self.view_of or self
        return Node(shape, (self,), root, is_external=root.is_external, is_strided=strided, item_bytes=self.item_bytes)


def _squeezed(shape: Shape) -> Shape:
    kept = list(shape)
    while kept and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


class _Blocks:
    """The free blocks of a buffer that grows as needed, in order of their offsets; the last one is endless."""

    def __init__(self) -> None:
        self.free: list[list[int]] = [[0, 1 << 62]]
        self.largest_end = 0

    def take(self, nbytes: int) -> int:
        fitting = [block for block in self.free[:-1] if block[1] >= nbytes]
        least = min((block[1] for block in fitting), default=0)
        # of several that fit equally well the allocator takes the last
        block = next((block for block in reversed(fitting) if block[1] == least), self.free[-1])
        offset = block[0]
        block[0] += nbytes
        block[1] -= nbytes
        if not block[1]:
            self.free.remove(block)
        self.largest_end = max(self.largest_end, offset + nbytes)
        return offset

    def give_back(self, offset: int, nbytes: int) -> None:
        at = next(i for i, block in enumerate(self.free) if block[0] >= offset + nbytes)
        self.free.insert(at, [offset, nbytes])
        for i in (at, at - 1):  # merge with the block behind, then with the one before
            if 0 <= i < len(self.free) - 1 and sum(self.free[i]) == self.free[i + 1][0]:
                self.free[i][1] += self.free.pop(i + 1)[1]


@dataclass
class Graph:
    """Nodes in the order in which they are computed, and leaves in the order in which they are met."""

    nodes: list[Node] = field(default_factory=list)
    leaves: list[Node] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def expand(self, node: Node) -> Node:
        """Adds a node behind all that it is computed from, as `ggml_build_forward_expand`."""
        stack = [(node, 0)]
        while stack:
            current, at = stack.pop()
            if at == 0:
                if id(current) in self._seen:
                    continue
                self._seen.add(id(current))
            if at < len(current.sources):
                stack += [(current, at + 1), (current.sources[at], 0)]
            else:
                (self.nodes if current.sources else self.leaves).append(current)
        return node

    def buffer_bytes(self) -> int:
        """Bytes of the buffer in which all nodes can be computed. A graph is walked once."""
        blocks = _Blocks()
        for leaf in self.leaves:
            self._allocate(leaf, blocks)
        for node in self.nodes:
            if node.view_of is not None:
                node.view_of.views += 1
            for source in node.sources:
                source.children += 1
        for node in self.nodes:
            self._allocate(node, blocks)
            for source in node.sources:
                source.children -= 1
                if not source.children and not source.views:
                    self._release(source, blocks)
        return blocks.largest_end

    def _allocate(self, node: Node, blocks: _Blocks) -> None:
        if node.is_external or node.view_of is not None or node.offset >= 0:
            return
        for operand in node.sources if node.in_place else ():
            is_last = operand.children == 1 and operand.views == 0
            # a view is never "own" to the allocator, so what only views look at is not written over
            if is_last and operand.offset >= 0 and not operand.is_output and node.lies_like(operand):
                node.offset, operand.offset = operand.offset, -1
                return
        node.offset = blocks.take(node.nbytes) if node.nbytes else -1

    def _release(self, source: Node, blocks: _Blocks) -> None:
        owner = source
        if source.view_of is not None:
            owner = source.view_of
            owner.views -= 1
            if owner.views or owner.children:
                return
        if owner.offset >= 0 and not owner.is_output:
            blocks.give_back(owner.offset, owner.nbytes)
            owner.offset = -1


def new_input(*shape: int, item_bytes: int = F32_BYTES) -> Node:
    """A tensor that is filled before the computation."""
    return Node(shape, item_bytes=item_bytes)


def op(shape: Shape, *sources: Node, item_bytes: int = F32_BYTES) -> Node:
    """An operator that writes into memory of its own."""
    return Node(shape, sources, item_bytes=item_bytes)


def in_place(first: Node, *others: Node) -> Node:
    """An operator that may write over one of its operands; its result has the shape of the first."""
    return Node(first.shape, (first, *others), in_place=True)
