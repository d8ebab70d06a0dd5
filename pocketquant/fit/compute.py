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
from pocketquant.fit.graph import F16_BYTES, F32_BYTES, I32_BYTES, I64_BYTES, Graph, Node, in_place, new_input, op

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
        self.graph.expand(op((width, n), new_input(n, item_bytes=I32_BYTES)))  # the embedding's rows
        current = self.graph.nodes[-1]
        self.graph.expand(new_input(width, n))  # in place of tokens: set aside, never used, never freed
        for kind in kinds:
            normed = self.graph.expand(self.norm(current))
            mixed = self.delta_net(normed) if kind == DELTA else self.attention(normed)
            current = in_place(mixed, current)
            residual = current
            current = in_place(self.feed_forward(self.norm(current)), residual)
        return self.head(current, keeps_chosen=True)

    def mtp_graph(self) -> Graph:
        """`graph_mtp`: an embedding and a hidden state side by side, one block, and the head."""
        width, n = self.sizes["n_embd"], self.n
        hidden, token = new_input(width, n), op((width, n), new_input(n, item_bytes=I32_BYTES))
        of_hidden, of_token = self.norm(hidden), self.norm(token)
        current = op((width, n), op((2 * width, n), of_token, of_hidden))
        residual = current
        current = in_place(self.attention(self.norm(current)), residual)
        residual = current
        current = in_place(self.feed_forward(self.norm(current)), residual)
        return self.head(current, keeps_chosen=False)

    def head(self, current: Node, *, keeps_chosen: bool) -> Graph:
        """The last norm and the logits of the tokens that get some; what is read afterwards is never freed."""
        outputs = self.batch.outputs
        hidden = self.norm(current)
        chosen = op((self.sizes["n_embd"], outputs), hidden, new_input(outputs, item_bytes=I32_BYTES))
        logits = op((self.sizes["n_vocab"], outputs), chosen)
        hidden.is_output = logits.is_output = True
        chosen.is_output = keeps_chosen
        self.graph.expand(logits)
        return self.graph

    def norm(self, current: Node) -> Node:
        """RMS norm, then its weights."""
        return in_place(in_place(current))

    # ---------------------------------------------------------------- attention

    @cached_property
    def positions(self) -> Node:
        return new_input(_POSITIONS * self.n, item_bytes=I32_BYTES)

    @cached_property
    def k_rows(self) -> Node:
        return new_input(self.n, item_bytes=I64_BYTES)

    @cached_property
    def v_rows(self) -> Node:
        each = 1 if self.batch.flash_attention else self.sizes["kv_dim"]  # transposed values are written one by one
        return new_input(self.n * each, item_bytes=I64_BYTES)

    @cached_property
    def mask(self) -> Node:
        item = F16_BYTES if self.batch.flash_attention else F32_BYTES
        return new_input(self.batch.context, self.n, item_bytes=item)

    @cached_property
    def k_rotation(self) -> Node:
        size = _ROTATED_BLOCK
        while self.sizes["head_dim"] % (2 * size) == 0:
            size *= 2
        return new_input(size, size)

    @cached_property
    def v_rotation(self) -> Node:
        return new_input(_ROTATED_BLOCK, _ROTATED_BLOCK)

    def rotated(self, current: Node, rotation: Node) -> Node:
        """`llama_mul_mat_hadamard`."""
        flat = current.view(rotation.shape[0], _count(current) // rotation.shape[0])
        return op(flat.shape, rotation, flat).view(*current.shape)

    def attention(self, normed: Node) -> Node:
        s, n, batch = self.sizes, self.n, self.batch
        head, n_head, n_kv = s["head_dim"], s["n_head"], s["n_kv"]
        q_and_gate = op((s["q_dim"], n), normed)
        k, v = op((s["kv_dim"], n), normed), op((s["kv_dim"], n), normed)
        q = self.norm(q_and_gate.view(head, n_head, n, strided=True))
        k = self.norm(k.view(head, n_kv, n))
        gate = op((head * n_head, n), q_and_gate.view(head, n_head, n, strided=True))
        v = v.view(head, n_kv, n)
        q, k = in_place(q, self.positions), in_place(k, self.positions)
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
        return op((s["n_embd"], n), in_place(current, in_place(gate)))

    def scores(self, q: Node) -> Node:
        """`build_attn_mha`."""
        head, n, n_head = q.shape
        if self.batch.flash_attention:
            current = op((head, n_head, n), q, self.mask).view(head * n_head, n)
        else:
            scores = in_place(op((self.batch.context, n, n_head), q), self.mask)
            mixed = op((head, n, n_head), scores)
            current = op((head * n_head, n), mixed.view(head, n_head, n, strided=True))
        return self.graph.expand(current)

    # ---------------------------------------------------------------- Gated DeltaNet

    @cached_property
    def state_rows(self) -> Node:
        return new_input(self.batch.sequences, item_bytes=I32_BYTES)

    def state(self, nbytes: int) -> Node:
        """`build_rs`: each sequence's state, copied out of the cache."""
        copied = op((nbytes, self.batch.sequences), self.state_rows.view(self.batch.sequences))
        return self.graph.expand(copied)

    def delta_net(self, normed: Node) -> Node:
        s, n = self.sizes, self.n
        sequences = self.batch.sequences
        taps, head_k, head_v = s["n_conv"] - 1, s["head_k_dim"], s["head_v_dim"]
        qkv = op((s["conv_dim"], n), normed)
        z = op((s["v_dim"], n), normed)
        beta = in_place(op((s["n_v"], n), normed).view(1, s["n_v"], n))
        alpha = op((s["n_v"], n), normed).view(s["n_v"], n)
        decay = in_place(in_place(in_place(alpha))).view(1, s["n_v"], n)  # bias, softplus, A
        conv_state = self.state(taps * s["conv_dim"]).view(taps, s["conv_dim"], sequences)
        per_sequence = n // sequences
        conv_input = op(
            (taps + per_sequence, s["conv_dim"], sequences), conv_state, qkv.view(n, s["conv_dim"], strided=True)
        )
        self.graph.expand(_stored(conv_input.view(taps, s["conv_dim"], sequences, strided=True)))
        state = self.state(s["head_v_dim"] * s["v_dim"]).view(head_v, head_v, s["n_v"], sequences)
        convolved = in_place(op((s["conv_dim"], n), conv_input))
        q, k = (_l2_norm(convolved.view(head_k, s["n_k"], n, strided=True)) for _ in range(2))
        v = convolved.view(head_v, s["n_v"], n, strided=True)
        both = op((s["v_dim"], n + head_v * sequences * self.batch.snapshots), q, k, v, decay, beta, state)
        output, new_state = both.view(head_v, s["n_v"], n), both.view(head_v, head_v, s["n_v"], sequences)
        self.graph.expand(_stored(new_state))
        gated = in_place(self.norm(output), in_place(z.view(head_v, s["n_v"], n)))
        return op((s["n_embd"], n), gated.view(s["v_dim"], n)).view(s["n_embd"], n)

    # ---------------------------------------------------------------- feed-forward

    def feed_forward(self, normed: Node) -> Node:
        if "n_expert" not in self.sizes:
            return self.gated(normed, self.sizes["n_ff"])
        routed = self.experts(normed)
        shared = self.gated(normed, self.sizes["n_ff_shared"])
        weight = in_place(op((1, self.n), normed))
        return in_place(routed, in_place(shared, weight))

    def gated(self, normed: Node, width: int) -> Node:
        up = op((width, self.n), normed)
        gate = op((width, self.n), normed)
        return op((self.sizes["n_embd"], self.n), op((width, self.n), gate, up))

    def experts(self, normed: Node) -> Node:
        """`build_moe_ffn`."""
        s, n, used = self.sizes, self.n, self.sizes["n_expert_used"]
        probabilities = in_place(op((s["n_expert"], n), normed))
        order = op((s["n_expert"], n), probabilities, item_bytes=I32_BYTES)
        selected = order.view(used, n, strided=True)
        weights = op((1, used, n), probabilities.view(1, s["n_expert"], n), selected).view(used, n)
        weights = in_place(weights, in_place(op((1, n), weights))).view(1, used, n)
        self.graph.expand(weights)
        each = normed.view(s["n_embd"], 1, n)
        up = op((s["n_ff_exp"], used, n), each, selected)
        gate = op((s["n_ff_exp"], used, n), each, selected)
        down = op((s["n_embd"], used, n), op((s["n_ff_exp"], used, n), gate, up), selected)
        down = self.graph.expand(in_place(down, weights))
        views = [self.graph.expand(down.view(s["n_embd"], n, strided=True)) for _ in range(used)]
        total = views[0]
        for view in views[1:]:
            total = self.graph.expand(in_place(total, view))
        return total if used > 1 else op((s["n_embd"], n), total)


def _count(node: Node) -> int:
    count = 1
    for size in node.shape:
        count *= size
    return count


def _stored(*sources: Node) -> Node:
    """A copy into a cache, which lies elsewhere."""
    return Node((), sources, is_external=True)


def _l2_norm(node: Node) -> Node:
    """`build_gdn_l2_norm`: an RMS norm, scaled."""
    return in_place(in_place(node))
