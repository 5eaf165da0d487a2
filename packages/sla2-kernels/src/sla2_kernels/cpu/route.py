"""Routing on numpy arrays: top-k, the transposed map."""

from __future__ import annotations

import numpy as np

from sla2_kernels.cpu.build import Array, inner, kernel, run


@kernel
def _count_queries(indices: Array, counts: Array, query_counts: Array, lo: int, hi: int) -> None:
    for bh in range(lo, hi):
        query_counts[bh] = 0
        for i in range(counts.shape[1]):
            for s in range(counts[bh, i]):
                query_counts[bh, indices[bh, i, s]] += 1


@kernel
def _scatter_queries(
    indices: Array, counts: Array, queries: Array, query_counts: Array, lo: int, hi: int
) -> None:
    for bh in range(lo, hi):
        queries[bh] = -1
        query_counts[bh] = 0
        for i in range(counts.shape[1]):
            for s in range(counts[bh, i]):
                j = indices[bh, i, s]
                queries[bh, j, query_counts[bh, j]] = i
                query_counts[bh, j] += 1


def transposed_map(
    indices: Array, counts: Array, t_n: int, threads: int = 1
) -> tuple[Array, Array]:
    """For each key block the query blocks that selected it.

    Args:
        indices: int32 (G, T_m, K). counts: int32 (G, T_m).
        t_n: key blocks.

    Returns:
        Query blocks int32 (G, T_n, most), ascending, -1 past the counts, and counts int32 (G, T_n).
    """
    query_counts = np.empty((len(counts), t_n), np.int32)
    run(_count_queries, len(counts), threads, indices, counts, query_counts)
    queries = np.empty((len(counts), t_n, max(1, int(query_counts.max()))), np.int32)
    run(_scatter_queries, len(counts), threads, indices, counts, queries, query_counts)
    return queries, query_counts


@inner
def _sift(heap: Array, places: Array, size: int, at: int) -> None:
    """Restore the heap below `at`: its top is the worst, the lowest score and of equal ones the
    highest place.
    """
    while True:
        worst = at
        for child in (2 * at + 1, 2 * at + 2):
            if child < size and (
                heap[child] < heap[worst]
                or (heap[child] == heap[worst] and places[child] > places[worst])
            ):
                worst = child
        if worst == at:
            return
        heap[at], heap[worst] = heap[worst], heap[at]
        places[at], places[worst] = places[worst], places[at]
        at = worst


@kernel
def _select(scores: Array, count: int, indices: Array, lo: int, hi: int) -> None:
    t_m, t_n = scores.shape[1], scores.shape[2]
    heap, places, chosen = (
        np.empty(count, scores.dtype),
        np.empty(count, np.int32),
        np.empty(t_n, np.bool_),
    )
    for item in range(lo, hi):
        bh, i = item // t_m, item % t_m
        for s in range(count):
            x = scores[bh, i, s]
            heap[s], places[s] = (np.inf if x != x else x), s
        for at in range(count // 2 - 1, -1, -1):
            _sift(heap, places, count, at)
        for j in range(count, t_n):
            x = scores[bh, i, j]
            x = np.inf if x != x else x
            if x > heap[0]:
                heap[0], places[0] = x, j
                _sift(heap, places, count, 0)
        chosen[:] = False
        for s in range(count):
            chosen[places[s]] = True
        s = 0
        for j in range(t_n):
            if chosen[j]:
                indices[bh, i, s] = j
                s += 1


def top_k(scores: Array, count: int, threads: int = 1) -> Array:
    """The `count` largest of each row (Alg. 2), ties to the lower index, NaN first.

    Args:
        scores: (G, T_m, T_n) float32 or float64.
        count: 1 to T_n.

    Returns:
        Indices int32 (G, T_m, count), ascending.
    """
    indices = np.empty((*scores.shape[:2], count), np.int32)
    run(_select, scores.shape[0] * scores.shape[1], threads, scores, count, indices)
    return indices
