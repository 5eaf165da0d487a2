// What the backward kernels of the block-sparse branch share: tiles, formats, the walk over a row's
// blocks, products.
//
// Compiled for a low-bit precision, they differentiate what the low-bit forward computed
// ("matched"): q and k hold the quantised values without their scales, which 16 bit holds exactly,
// and the scales go into fp32 factors; v holds the dequantised values rounded to 16 bit; P is
// quantised again for dV.
#pragma once

#include "formats.cuh"
#include "tile.cuh"

constexpr bool MATCHED = SLA2_PRECISION != 0;
// Query rows of a tile: a query block is one or two of them.
constexpr int ROWS = BLOCK_Q < 64 ? BLOCK_Q : 64;
constexpr int PARTS = BLOCK_Q / ROWS;
constexpr int ROW_BYTES_ALL = ROWS * HALF_ROW;
constexpr int KEY_BYTES = BLOCK_K * HALF_ROW;
// A warp has 16 query rows for dQ, 16 keys for dK and dV. Where tensor cores are slow and shared
// memory has room for one block of threads, two warps have the same: each takes half of every
// tile's keys, or of its rows, and their sums meet at the end (kernels.py launches as many
// threads).
constexpr bool HALVES = !FAST_MMA && HEAD_DIM == 128;
constexpr int KEY_HALVES = HALVES && BLOCK_K % 32 == 0 ? 2 : 1;
constexpr int ROW_HALVES = HALVES && ROWS % 32 == 0 ? 2 : 1;
constexpr int WARP_KEYS = BLOCK_K / KEY_HALVES, WARP_ROWS = ROWS / ROW_HALVES;
constexpr int DQ_THREADS = 2 * ROWS * KEY_HALVES;
constexpr int DKV_THREADS = 2 * BLOCK_K * ROW_HALVES;

// The first row of a warp for dQ, and which half of the keys it has; the first key for dK and dV,
// and which half of the rows.
SLA2_INLINE int first_row_of_warp() {
    const int warp = threadIdx.x / 32;
    return (KEY_HALVES == 1 ? warp : warp % (ROWS / 16)) * 16;
}
SLA2_INLINE int half_of_keys() { return KEY_HALVES == 1 ? 0 : threadIdx.x / (2 * ROWS); }
SLA2_INLINE int first_key_of_warp() {
    const int warp = threadIdx.x / 32;
    return (ROW_HALVES == 1 ? warp : warp % (BLOCK_K / 16)) * 16;
}
SLA2_INLINE int half_of_rows() { return ROW_HALVES == 1 ? 0 : threadIdx.x / (2 * BLOCK_K); }
static_assert(BLOCK_Q % ROWS == 0, "a query block is whole tiles");

// The scale of a block's values of Q or K, 1 where they are no quantised ones.
SLA2_INLINE float scale_of_block(const float* scales, long long block) {
    return MATCHED ? scales[block] : 1.0f;
}

// dS goes into a product with Q or K in 16 bit. Quantised Q and K are up to QK_LIMIT, their scales
// as much smaller: with this factor in dS, and OUT_FACTOR on the sum, both have the size of the
// plain ones.
constexpr float IN_FACTOR = MATCHED ? QK_LIMIT : 1.0f;
constexpr float OUT_FACTOR = MATCHED ? 1.0f / QK_LIMIT : 1.0f;

// Adds the sums of two warps that have the same rows or keys; the first half of THREADS gets them.
// `between` holds a float for each sum of a half, and nobody else is at it.
template <int THREADS>
SLA2_INLINE void join(float (&acc)[D_TILES][4], float* between) {
    float* own = between + threadIdx.x % (THREADS / 2);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4 * D_TILES; ++i)
        if (threadIdx.x >= THREADS / 2) own[i * (THREADS / 2)] = acc[i / 4][i % 4];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4 * D_TILES; ++i)
        if (threadIdx.x < THREADS / 2) acc[i / 4][i % 4] += own[i * (THREADS / 2)];
}

// Takes the key blocks of `list` through two K tiles and two V tiles, by DQ_THREADS threads:
// with_k(k_tile, block) runs while V of the block may still travel, with_v(k_tile, v_tile, block)
// while K of the next may; both get the warp's keys of a tile, from number key0 on. `list` is
// indexed from 0 to steps - 1. Copies that the caller has issued and not committed have landed by
// the first with_k.
template <class List, class WithK, class WithV>
SLA2_INLINE void walk_blocks(const half_bits* k, const half_bits* v, List list, int steps,
                             int length, unsigned char* k_ring, unsigned char* v_ring, WithK with_k,
                             WithV with_v) {
    const int own = half_of_keys() * WARP_KEYS * HALF_ROW;  // the warp's keys of a tile
    int block = 0, next = 0;
    if (steps > 0) {
        block = list[0];
        next = steps > 1 ? list[1] : 0;
        const long long at = static_cast<long long>(block) * BLOCK_K * HEAD_DIM;
        load_tile<BLOCK_K, HALF_ROW, DQ_THREADS>(k_ring, k + at, HALF_ROW,
                                                 length - block * BLOCK_K);
        cp_async_commit();
        load_tile<BLOCK_K, HALF_ROW, DQ_THREADS>(v_ring, v + at, HALF_ROW,
                                                 length - block * BLOCK_K);
        cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        const unsigned char* k_tile = k_ring + (step & 1) * KEY_BYTES + own;
        const unsigned char* v_tile = v_ring + (step & 1) * KEY_BYTES + own;
        const int other = ((step + 1) & 1) * KEY_BYTES;
        const long long next_at = static_cast<long long>(next) * BLOCK_K * HEAD_DIM;
        const int next_valid = length - next * BLOCK_K;
        const bool more = step + 1 < steps;
        const int after = step + 2 < steps ? list[step + 2] : 0;

        // As in sparse_fwd.cu: the newest group is V of this step, so K is here.
        cp_async_wait<1>();
        __syncthreads();
        if (more)
            load_tile<BLOCK_K, HALF_ROW, DQ_THREADS>(k_ring + other, k + next_at, HALF_ROW,
                                                     next_valid);
        cp_async_commit();
        with_k(k_tile, block);

        // The newest group is K of the next step, so V is here. with_v still reads K of this step:
        // its slot is refilled only after the next barrier.
        cp_async_wait<1>();
        __syncthreads();
        if (more)
            load_tile<BLOCK_K, HALF_ROW, DQ_THREADS>(v_ring + other, v + next_at, HALF_ROW,
                                                     next_valid);
        cp_async_commit();
        with_v(k_tile, v_tile, block);
        block = next;
        next = after;
    }
    cp_async_wait<0>();
}

// acc += W B for weights in accumulator layout, 16 rows by 8 TILES columns, and a tile
// [8 TILES][d]. Two accumulator tiles are one A operand as they lie: README.md, "Fragments".
template <int TILES>
SLA2_INLINE void product_over_rows(float (&acc)[D_TILES][4], const float (&weights)[TILES][4],
                                   const unsigned char* right) {
#pragma unroll
    for (int c = 0; c < TILES / 2; ++c) {
        unsigned a[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
            a[r] = pack_half(weights[2 * c + (r >> 1)][2 * (r & 1)],
                             weights[2 * c + (r >> 1)][2 * (r & 1) + 1]);
#pragma unroll
        for (int n = 0; n < D_TILES; n += 2) {
            unsigned b[4];
            load_b_trans<HALF_ROW>(b, right, 16 * c, 8 * n);
            mma_half(acc[n], a, &b[0]);
            mma_half(acc[n + 1], a, &b[2]);
        }
    }
}

// acc_k += dS^T Q and acc_v += P^T dO, for the warp's 16 keys and its rows of `steps` tiles of
// them. load_rows(step) starts the copy of a tile's Q and dO into slot step % 2 of the rings.
// probabilities(p, step) makes P^T of S^T, gradients(p, d_p, step) dS^T of dP^T, and of P^T what dO
// is multiplied by. Copies that the caller has issued and not committed have landed by the first
// product. Nobody reads the rings afterwards.
template <int UNROLL, class LoadRows, class Probabilities, class Gradients>
SLA2_INLINE void walk_rows(float (&acc_k)[D_TILES][4], float (&acc_v)[D_TILES][4],
                           const unsigned char* k_tile, const unsigned char* v_tile,
                           const unsigned char* q_ring, const unsigned char* grad_ring, int steps,
                           LoadRows load_rows, Probabilities probabilities, Gradients gradients) {
    const int key0 = first_key_of_warp();
    const int own = half_of_rows() * WARP_ROWS * HALF_ROW;  // the warp's rows of a tile
    if (steps > 0) {
        load_rows(0);
        cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        const unsigned char* q_tile = q_ring + (step & 1) * ROW_BYTES_ALL + own;
        const unsigned char* grad_tile = grad_ring + (step & 1) * ROW_BYTES_ALL + own;
        // One group in flight: rows of this step. They had the whole step before to travel, and the
        // barrier also covers what load_rows stores itself.
        cp_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) load_rows(step + 1);
        cp_async_commit();

        // Transposed, keys by queries: the warp's 16 keys are accumulator rows, so P^T and dS^T are
        // A operands of dV and dK as they lie.
        float p[WARP_ROWS / 8][4], d_p[WARP_ROWS / 8][4];
        clear(p);
        product_over_channels<UNROLL>(p, k_tile, key0, q_tile);
        probabilities(p, step);
        clear(d_p);
        product_over_channels<UNROLL>(d_p, v_tile, key0, grad_tile);
        gradients(p, d_p, step);
        product_over_rows(acc_v, p, grad_tile);
        product_over_rows(acc_k, d_p, q_tile);
    }
    cp_async_wait<0>();
    __syncthreads();
}
