"""The operator's forward and backward on numpy arrays: which kernel runs on what, for a few heads
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sla2_kernels.cpu.backward import d_key_blocks, d_query_blocks
from sla2_kernels.cpu.build import Array, run
from sla2_kernels.cpu.elementwise import LOG2_E
from sla2_kernels.cpu.forward import query_blocks
from sla2_kernels.cpu.pooled import log_sizes
from sla2_kernels.cpu.route import transposed_map
from sla2_kernels.cpu.states import complement, key_blocks, masked_sum
from sla2_kernels.cpu.tiles import PAD

ROUNDING = {"none": 0, "fp8": 1, "int8": 2}
# Of the heads that are worked on together, unless one head alone needs more.
_STATE_BYTES = 64 << 20
_SCORES = 1 << 16  # scores held at once by a thread: 256 KB in fp32, within the second-level cache
_TILE = 64  # pooled keys in a tile
# Into how many parts a head's query blocks fall, each of which sums the gradients of all pooled
# keys by itself: a fixed number, so that the sums do not depend on the threads.
_PARTS = 16


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


@dataclass(frozen=True)
class Map:
    """A block map of G heads (batch and head flattened).

    Attributes:
        indices: selected key blocks, int32 (G, T_m, K), ascending, -1 past the counts.
        counts: int32 (G, T_m).
        lengths: valid key tokens, int64 (G,).
        block_q, block_k: tokens in a query block and in a key block.
        n_k: key tokens.
    """

    indices: Array
    counts: Array
    lengths: Array
    block_q: int
    block_k: int
    n_k: int

    def tokens(self) -> Array:
        """Valid tokens of each key block, int64 (G, T_n)."""
        start = np.arange(0, self.n_k, self.block_k)
        return np.clip(self.lengths[:, None] - start, 0, self.block_k)

    def heads(self, part: slice) -> Map:
        """The map of some heads."""
        return Map(
            self.indices[part],
            self.counts[part],
            self.lengths[part],
            self.block_q,
            self.block_k,
            self.n_k,
        )


def _groups(block_map: Map, wide: int, itemsize: int) -> Iterator[slice]:
    """Slices of heads that are worked on together."""
    g, t_m = block_map.counts.shape
    t_n = -(-block_map.n_k // block_map.block_k)
    size = max(1, _STATE_BYTES // ((t_m + t_n) * wide * (wide + 1) * itemsize))
    return (slice(start, min(g, start + size)) for start in range(0, g, size))


class _Blocks:
    """K and V of some heads laid out by key block; (h_j, z_j) of each in `panels` panels; with
    `means` the mean of each.

    What the backward alone needs, or the forward alone, has T_n = 0 in the other.
    """

    def __init__(
        self,
        low: tuple[Array, Array],
        whole: tuple[Array, Array],
        tokens: Array,
        block: int,
        panels: tuple[int, int],
        means: bool,
        backward: bool,
        threads: int,
    ) -> None:
        k = whole[0]
        kind, d = k.dtype, k.shape[2]
        wide, width = _up(d, PAD), _up(block, PAD)
        heads, t_n = tokens.shape

        def layout(rows: int, columns: int, wanted: bool) -> Array:
            return np.empty((heads, t_n if wanted else 0, rows, columns), kind)

        self.kt, self.vt = layout(wide, width, True), layout(wide, width, backward)
        self.k_rows, self.v_rows = layout(width, wide, backward), layout(width, wide, not backward)
        self.states = np.empty((heads, panels[0], t_n, panels[1]), kind)
        shape = (heads, t_n if means else 0, d)
        self.means = np.empty(shape, kind), np.empty(shape, kind)
        run(
            key_blocks,
            heads * t_n,
            threads,
            *low,
            *whole,
            tokens,
            block,
            kind.type(LOG2_E / d**0.5),
            self.kt,
            self.k_rows,
            self.vt,
            self.v_rows,
            self.states,
            *self.means,
        )


class _Pooled(_Blocks):
    """The block means of K and V as keys and values of their own, laid out in tiles, and what is
    added to their logits. All of it is empty without `bias`, (G, T_m), b of each query block.
    """

    def __init__(
        self, here: Map, keys: _Keys, bias: Array | None, backward: bool, threads: int
    ) -> None:
        means, tokens = keys.means, keys.tokens
        heads, t_n, _ = means[0].shape
        width = min(_TILE, _up(max(1, t_n), PAD))
        tiles = np.clip(t_n - np.arange(0, t_n, width), 0, width)
        inside = np.tile(tiles, (heads, 1)).astype(np.int64)
        super().__init__(means, means, inside, width, (0, PAD), False, backward, threads)
        rows = here.counts.shape[1] if bias is not None else 0
        self.sizes = np.empty((heads, rows, len(tiles) * width), means[0].dtype)
        # Query blocks that one work item of the backward takes.
        self.step = max(1, -(-rows // _PARTS))
        if bias is not None:
            run(
                log_sizes,
                heads,
                threads,
                bias,
                here.indices,
                here.counts,
                tokens,
                self.sizes,
            )

    def gradients(self) -> tuple[Array, Array]:
        """Empty sums of d_query_blocks, for keys and for values: (G, parts, tiles, W D)."""
        heads, tiles, wide, width = self.kt.shape
        shape = (heads, -(-self.sizes.shape[1] // self.step), tiles, width * wide)
        return np.empty(shape, self.kt.dtype), np.empty(shape, self.kt.dtype)

    def total(self, parts: Array) -> Array:
        """Sums of d_query_blocks as the gradients of the means: (G, T_n padded, D)."""
        heads, tiles, wide, width = self.kt.shape
        whole: Array = parts.sum(1)
        return whole.reshape(heads, tiles * width, wide)


class _Keys(_Blocks):
    """K and V of some heads laid out by key block, and the linear branch's sums over unselected
    blocks.
    """

    def __init__(
        self,
        here: Map,
        k_low: Array,
        v_low: Array,
        k: Array,
        v: Array,
        linear: bool,
        pooled: bool,
        backward: bool,
        threads: int,
    ) -> None:
        kind = k.dtype
        self.wide = _up(k.shape[2], PAD)
        self.tokens = here.tokens()
        heads, t_n = self.tokens.shape
        t_m = here.counts.shape[1]
        self.panel = next(size for size in (64, 32, 16) if self.wide % size == 0)
        self.panels = (self.wide + 1) * (self.wide // self.panel) if linear else 0
        panels = (self.panels, self.panel)
        low, whole = (k_low, v_low), (k, v)
        super().__init__(low, whole, self.tokens, here.block_k, panels, pooled, backward, threads)
        states = self.states
        self.rest = np.empty((heads, _up(t_m, 8) if linear else 0, _up(t_n, 8)), kind)
        self.share = np.empty((heads, t_m), np.int8)
        self.sums = np.empty((heads, self.rest.shape[1], self.wide * (self.wide + 1)), kind)
        if linear:
            run(
                complement,
                heads,
                threads,
                self.rest,
                here.indices,
                here.counts,
                self.tokens,
                self.share,
            )
            run(masked_sum, heads * self.panels, threads, self.rest, states, False, self.sums)


def forward(
    q: Array,
    k: Array,
    v: Array,
    block_map: Map,
    alpha: Array | None,
    low: tuple[Array, Array, Array] | None = None,
    rounding: str = "none",
    threads: int = 1,
    complement: str = "linear",
) -> tuple[Array, Array, Array]:
    """O, O_s and L of the operator (Eq. 13-16).

    Args:
        q: contiguous float32 or float64 (G, N_q, d).
        k, v: the same, (G, N_k, d); K already smoothed.
        block_map: the selected blocks; values are not checked.
        alpha: (G, T_m) of q's dtype, or None for the sparse branch alone. With the complement
            "pooled" it holds b.
        low: what the sparse branch sees in place of (q, k, v), or None.
        rounding: how it rounds P~, "none", "fp8" or "int8".
        threads: how many work.
        complement: what an alpha mixes in, "linear", or "pooled": one key for each block that is
            not selected, its mean, in the same softmax with log(its tokens) + b added to its logit.

    Returns:
        out and o_s (G, N_q, d), and the natural log-sum-exp lse (G, N_q), -inf where a row selects
        nothing. Without alpha, out is o_s. With "pooled" too, and lse is that of the softmax which
        the pooled keys have joined.
    """
    (g, n_q, d), kind = q.shape, q.dtype
    q_low, k_low, v_low = low or (q, k, v)
    pooled = alpha is not None and complement == "pooled"
    t_m, linear = block_map.counts.shape[1], alpha is not None and not pooled
    o_s, lse = np.empty(q.shape, kind), np.empty((g, n_q), kind)
    out = np.empty(q.shape, kind) if linear else o_s
    alpha = np.empty((g, t_m), kind) if alpha is None else alpha
    longest = block_map.indices.shape[2]
    group = max(1, _SCORES // (_up(block_map.block_q, PAD) * _up(block_map.block_k, PAD)))
    group = longest if rounding != "none" else min(group, longest)
    for part in _groups(block_map, _up(d, PAD), kind.itemsize):
        here = block_map.heads(part)
        whole, kinds = (k[part], v[part]), (linear, pooled)
        keys = _Keys(here, k_low[part], v_low[part], *whole, *kinds, False, threads)
        means = _Pooled(here, keys, alpha[part] if pooled else None, False, threads)
        run(
            query_blocks,
            keys.share.size,
            threads,
            q_low[part],
            q[part],
            here.indices,
            here.counts,
            keys.tokens,
            here.block_q,
            group,
            ROUNDING[rounding],
            keys.kt,
            keys.v_rows,
            keys.sums,
            keys.share,
            alpha[part],
            means.kt,
            means.v_rows,
            means.sizes,
            o_s[part],
            lse[part],
            out[part],
        )
    return out, o_s, lse


def backward(
    grad_out: Array,
    q: Array,
    k: Array,
    v: Array,
    block_map: Map,
    alpha: Array | None,
    o_s: Array,
    lse: Array,
    threads: int = 1,
    complement: str = "linear",
) -> tuple[Array, Array, Array, Array]:
    """dQ, dK, dV and d alpha from the forward's O_s and L (Alg. 3).

    Args:
        grad_out, o_s: (G, N_q, d) of q's dtype.
        lse: natural, (G, N_q).
        q, k, v, block_map, alpha, threads, complement: as of `forward`.

    Returns:
        dQ, dK, dV in the shapes of q, k and v, and d alpha (G, T_m), 0 without alpha. With
        "pooled", the gradient of b in its place.
    """
    (g, _, d), kind = q.shape, q.dtype
    pooled = alpha is not None and complement == "pooled"
    t_m, linear = block_map.counts.shape[1], alpha is not None and not pooled
    d_q, d_k, d_v, d_alpha = (
        np.empty_like(q),
        np.empty_like(k),
        np.empty_like(v),
        np.empty((g, t_m), kind),
    )
    alpha = d_alpha if alpha is None else alpha
    for part in _groups(block_map, _up(d, PAD), kind.itemsize):
        here = block_map.heads(part)
        whole, kinds = (k[part], v[part]), (linear, pooled)
        keys = _Keys(here, *whole, *whole, *kinds, True, threads)
        means = _Pooled(here, keys, alpha[part] if pooled else None, True, threads)
        d_pooled_k, d_pooled_v = means.gradients()
        heads, t_n = keys.tokens.shape
        tall = _up(here.block_q, PAD)
        q_rows, g_rows = (np.empty((heads, t_m, tall, keys.wide), kind) for _ in range(2))
        q_turned, g_turned = (np.empty((heads, t_m, keys.wide, tall), kind) for _ in range(2))
        d_rows = np.empty((heads, 2, t_m, tall), kind)
        d_sums = np.empty((heads, keys.panels, t_m, keys.panel), kind)
        run(
            d_query_blocks,
            heads * -(-t_m // means.step),
            threads,
            q[part],
            grad_out[part],
            o_s[part],
            lse[part],
            here.indices,
            here.counts,
            keys.tokens,
            here.block_q,
            keys.kt,
            keys.k_rows,
            keys.vt,
            keys.sums,
            keys.share,
            alpha[part],
            means.kt,
            means.k_rows,
            means.vt,
            means.sizes,
            means.step,
            d_q[part],
            d_alpha[part],
            d_sums,
            d_pooled_k,
            d_pooled_v,
            d_rows,
            q_rows,
            q_turned,
            g_rows,
            g_turned,
        )
        d_states = np.empty(
            (heads, keys.rest.shape[2] if linear else 0, keys.wide * (keys.wide + 1)), kind
        )
        if linear:
            run(masked_sum, heads * keys.panels, threads, keys.rest, d_sums, True, d_states)
        queries, query_counts = transposed_map(here.indices, here.counts, t_n)
        run(
            d_key_blocks,
            heads * t_n,
            threads,
            k[part],
            v[part],
            queries,
            query_counts,
            keys.tokens,
            here.block_k,
            keys.kt,
            keys.vt,
            d_rows,
            q_rows,
            q_turned,
            g_rows,
            g_turned,
            d_states,
            means.total(d_pooled_k),
            means.total(d_pooled_v),
            d_k[part],
            d_v[part],
        )
    return d_q, d_k, d_v, d_alpha
