"""The computation of one batch of a Qwen3.5 model as llama.cpp lays it out, to know how large its buffer becomes.

`compute_buffer_bytes` gives what llama.cpp logs as "compute buffer size": the worst case that it reserves when a
context is opened, a batch of `ubatch` tokens in front of a full cache.

Source: src/models/qwen35.cpp, src/models/qwen35moe.cpp, src/models/delta-net-base.cpp, `build_attn`, `build_moe_ffn`
and `build_rs` of src/llama-graph.cpp and `sched_reserve` of src/llama-context.cpp, of the llama.cpp in
llama-cpp-python 0.3.36, for one CPU backend with fused Gated DeltaNet, which every CPU has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pocketquant.architectures.table import DELTA
from pocketquant.fit.graph import F16_BYTES, F32_BYTES, I32_BYTES, I64_BYTES, Graph, Node

_POSITIONS = 4
"""Numbers that say where a token is: interleaved multi-dimensional rotation."""
_ROTATED_BLOCK = 64
"""A quantized cache is rotated by Hadamard matrices of 64 columns for values, of the largest power of two that divides
the head for keys."""


@dataclass(frozen=True)
class Batch:
    """What a context is opened with.

    Attributes:
        context: cells of the KV cache, a multiple of 256.
        tokens: the most tokens of a batch that are computed together, `--ubatch-size`.
        outputs: the most tokens of it that get logits.
        sequences: sequences that are kept apart.
        flash_attention: whether attention is computed without writing its scores down.
        rotate_k, rotate_v: whether keys and values are rotated, because their cache is quantized.
        snapshots: states that a DeltaNet block hands out, one more than the tokens that are drafted at a time.
    """

    context: int
    tokens: int
    outputs: int
    sequences: int = 1
    flash_attention: bool = True
    rotate_k: bool = False
    rotate_v: bool = False
    snapshots: int = 1


def compute_buffer_bytes(sizes: Mapping[str, int], kinds: tuple[str, ...], batch: Batch) -> int:
    """Bytes of the compute buffer on a CPU.

    Args:
        sizes: the dimension words of the model, as `pocketquant.model` lists them.
        kinds: DELTA or ATTENTION for every block of the trunk.
        batch: what the context is opened with.
    """
    return _Build(sizes, batch).graph_of(kinds).buffer_bytes()


def mtp_buffer_bytes(sizes: Mapping[str, int], batch: Batch) -> int:
    """The same for a context that drafts with the multi-token-prediction block; arguments as `compute_buffer_bytes`."""
    return _Build(sizes, batch).mtp_graph().buffer_bytes()


class _Build:
    """Builds the graph block by block; the methods are named as what they stand for in llama.cpp."""

    def __init__(self, sizes: Mapping[str, int], batch: Batch) -> None:
        self.sizes, self.batch = sizes, batch
        self.graph = Graph()
        self.n = batch.tokens

    def graph_of(self, kinds: tuple[str, ...]) -> Graph:
        width, n = self.sizes["n_embd"], self.n
        self.graph.expand(_op((width, n), _input(n, item_bytes=I32_BYTES)))  # the embedding's rows
        current = self.graph.nodes[-1]
        self.graph.expand(_input(width, n))  # in place of tokens: set aside, never used, never freed
        for kind in kinds:
            normed = self.graph.expand(self.norm(current))
            mixed = self.delta_net(normed) if kind == DELTA else self.attention(normed)
            current = _in_place(mixed, current)
            residual = current
            current = _in_place(self.feed_forward(self.norm(current)), residual)
        return self.head(current, keeps_chosen=True)

    def mtp_graph(self) -> Graph:
        """`graph_mtp`: an embedding and a hidden state side by side, one block, and the head."""
        width, n = self.sizes["n_embd"], self.n
        hidden, token = _input(width, n), _op((width, n), _input(n, item_bytes=I32_BYTES))
        of_hidden, of_token = self.norm(hidden), self.norm(token)
        current = _op((width, n), _op((2 * width, n), of_token, of_hidden))
        residual = current
        current = _in_place(self.attention(self.norm(current)), residual)
        residual = current
        current = _in_place(self.feed_forward(self.norm(current)), residual)
        return self.head(current, keeps_chosen=False)

    def head(self, current: Node, *, keeps_chosen: bool) -> Graph:
        """The last norm and the logits of the tokens that get some; what is read afterwards is never freed."""
        outputs = self.batch.outputs
        hidden = self.norm(current)
        chosen = _op((self.sizes["n_embd"], outputs), hidden, _input(outputs, item_bytes=I32_BYTES))
        logits = _op((self.sizes["n_vocab"], outputs), chosen)
        hidden.is_output = logits.is_output = True
        chosen.is_output = keeps_chosen
        self.graph.expand(logits)
        return self.graph

    def norm(self, current: Node) -> Node:
        """RMS norm, then its weights."""
        return _in_place(_in_place(current))

    # ---------------------------------------------------------------- attention

    @cached_property
    def positions(self) -> Node:
        return _input(_POSITIONS * self.n, item_bytes=I32_BYTES)

    @cached_property
    def k_rows(self) -> Node:
        return _input(self.n, item_bytes=I64_BYTES)

    @cached_property
    def v_rows(self) -> Node:
        each = 1 if self.batch.flash_attention else self.sizes["kv_dim"]  # transposed values are written one by one
        return _input(self.n * each, item_bytes=I64_BYTES)

    @cached_property
    def mask(self) -> Node:
        item = F16_BYTES if self.batch.flash_attention else F32_BYTES
        return _input(self.batch.context, self.n, item_bytes=item)

    @cached_property
    def k_rotation(self) -> Node:
        size = _ROTATED_BLOCK
        while self.sizes["head_dim"] % (2 * size) == 0:
            size *= 2
        return _input(size, size)

    @cached_property
    def v_rotation(self) -> Node:
        return _input(_ROTATED_BLOCK, _ROTATED_BLOCK)

    def rotated(self, current: Node, rotation: Node) -> Node:
        """`llama_mul_mat_hadamard`."""
        flat = current.view(rotation.shape[0], _count(current) // rotation.shape[0])
        return _op(flat.shape, rotation, flat).view(*current.shape)

    def attention(self, normed: Node) -> Node:
        s, n, batch = self.sizes, self.n, self.batch
        head, n_head, n_kv = s["head_dim"], s["n_head"], s["n_kv"]
        q_and_gate = _op((s["q_dim"], n), normed)
        k, v = _op((s["kv_dim"], n), normed), _op((s["kv_dim"], n), normed)
        q = self.norm(q_and_gate.view(head, n_head, n, strided=True))
        k = self.norm(k.view(head, n_kv, n))
        gate = _op((head * n_head, n), q_and_gate.view(head, n_head, n, strided=True))
        v = v.view(head, n_kv, n)
        q, k = _in_place(q, self.positions), _in_place(k, self.positions)
        if batch.rotate_k:
            q, k = self.rotated(q, self.k_rotation), self.rotated(k, self.k_rotation)
        if batch.rotate_v:
            v = self.rotated(v, self.v_rotation)
        for node in (q, v, k):
            self.graph.expand(node)
        self.graph.expand(_stored(k.view(s["kv_dim"], n), self.k_rows))
        rows = v.view(s["kv_dim"], n)
        self.graph.expand(_stored(rows if batch.flash_attention else rows.view(1, s["kv_dim"] * n), self.v_rows))
        current = self.scores(q.view(head, n, n_head))
        if batch.rotate_v:
            current = self.rotated(current, self.v_rotation)
        return _op((s["n_embd"], n), _in_place(current, _in_place(gate)))

    def scores(self, q: Node) -> Node:
        """`build_attn_mha`."""
        head, n, n_head = q.shape
        if self.batch.flash_attention:
            current = _op((head, n_head, n), q, self.mask).view(head * n_head, n)
        else:
            scores = _in_place(_op((self.batch.context, n, n_head), q), self.mask)
            mixed = _op((head, n, n_head), scores)
            current = _op((head * n_head, n), mixed.view(head, n_head, n, strided=True))
        return self.graph.expand(current)

    # ---------------------------------------------------------------- Gated DeltaNet

    @cached_property
    def state_rows(self) -> Node:
        return _input(self.batch.sequences, item_bytes=I32_BYTES)

    def state(self, nbytes: int) -> Node:
        """`build_rs`: each sequence's state, copied out of the cache."""
        copied = _op((nbytes, self.batch.sequences), self.state_rows.view(self.batch.sequences))
        return self.graph.expand(copied)

    def delta_net(self, normed: Node) -> Node:
        s, n = self.sizes, self.n
        sequences = self.batch.sequences
        taps, head_k, head_v = s["n_conv"] - 1, s["head_k_dim"], s["head_v_dim"]
        qkv = _op((s["conv_dim"], n), normed)
        z = _op((s["v_dim"], n), normed)
        beta = _in_place(_op((s["n_v"], n), normed).view(1, s["n_v"], n))
        alpha = _op((s["n_v"], n), normed).view(s["n_v"], n)
        decay = _in_place(_in_place(_in_place(alpha))).view(1, s["n_v"], n)  # bias, softplus, A
        conv_state = self.state(taps * s["conv_dim"]).view(taps, s["conv_dim"], sequences)
        per_sequence = n // sequences
        conv_input = _op(
            (taps + per_sequence, s["conv_dim"], sequences), conv_state, qkv.view(n, s["conv_dim"], strided=True)
        )
        self.graph.expand(_stored(conv_input.view(taps, s["conv_dim"], sequences, strided=True)))
        state = self.state(s["head_v_dim"] * s["v_dim"]).view(head_v, head_v, s["n_v"], sequences)
        convolved = _in_place(_op((s["conv_dim"], n), conv_input))
        q, k = (_l2_norm(convolved.view(head_k, s["n_k"], n, strided=True)) for _ in range(2))
        v = convolved.view(head_v, s["n_v"], n, strided=True)
        both = _op((s["v_dim"], n + head_v * sequences * self.batch.snapshots), q, k, v, decay, beta, state)
        output, new_state = both.view(head_v, s["n_v"], n), both.view(head_v, head_v, s["n_v"], sequences)
        self.graph.expand(_stored(new_state))
        gated = _in_place(self.norm(output), _in_place(z.view(head_v, s["n_v"], n)))
        return _op((s["n_embd"], n), gated.view(s["v_dim"], n)).view(s["n_embd"], n)

    # ---------------------------------------------------------------- feed-forward

    def feed_forward(self, normed: Node) -> Node:
        if "n_expert" not in self.sizes:
            return self.gated(normed, self.sizes["n_ff"])
        routed = self.experts(normed)
        shared = self.gated(normed, self.sizes["n_ff_shared"])
        weight = _in_place(_op((1, self.n), normed))
        return _in_place(routed, _in_place(shared, weight))

    def gated(self, normed: Node, width: int) -> Node:
        up = _op((width, self.n), normed)
        gate = _op((width, self.n), normed)
        return _op((self.sizes["n_embd"], self.n), _op((width, self.n), gate, up))

    def experts(self, normed: Node) -> Node:
        """`build_moe_ffn`."""
        s, n, used = self.sizes, self.n, self.sizes["n_expert_used"]
        probabilities = _in_place(_op((s["n_expert"], n), normed))
        order = _op((s["n_expert"], n), probabilities, item_bytes=I32_BYTES)
        selected = order.view(used, n, strided=True)
        weights = _op((1, used, n), probabilities.view(1, s["n_expert"], n), selected).view(used, n)
        weights = _in_place(weights, _in_place(_op((1, n), weights))).view(1, used, n)
        self.graph.expand(weights)
        each = normed.view(s["n_embd"], 1, n)
        up = _op((s["n_ff_exp"], used, n), each, selected)
        gate = _op((s["n_ff_exp"], used, n), each, selected)
        down = _op((s["n_embd"], used, n), _op((s["n_ff_exp"], used, n), gate, up), selected)
        down = self.graph.expand(_in_place(down, weights))
        views = [self.graph.expand(down.view(s["n_embd"], n, strided=True)) for _ in range(used)]
        total = views[0]
        for view in views[1:]:
            total = self.graph.expand(_in_place(total, view))
        return total if used > 1 else _op((s["n_embd"], n), total)


def _count(node: Node) -> int:
    count = 1
    for size in node.shape:
        count *= size
    return count


def _input(*shape: int, item_bytes: int = F32_BYTES) -> Node:
    return Node(shape, is_input=True, item_bytes=item_bytes)


def _op(shape: tuple[int, ...], *sources: Node, item_bytes: int = F32_BYTES) -> Node:
    """An operator that writes into memory of its own."""
    return Node(shape, sources, item_bytes=item_bytes)


def _in_place(first: Node, *others: Node) -> Node:
    """An operator that may write over one of its operands; its result has the shape of the first."""
    return Node(first.shape, (first, *others), in_place=True)


def _stored(*sources: Node) -> Node:
    """A copy into a cache, which lies elsewhere."""
    return Node((), sources, is_external=True)


def _l2_norm(node: Node) -> Node:
    """`build_gdn_l2_norm`: an RMS norm, scaled."""
    return _in_place(_in_place(node))
