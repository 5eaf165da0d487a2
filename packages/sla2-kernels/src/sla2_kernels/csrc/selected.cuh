// The selected key blocks of a row block in 16 bit: the main loop of the forward kernels, and the
// two products that it is made of.
#pragma once

#include "mix.cuh"

constexpr int KEY_TILES = BLOCK_K / 8;
constexpr int KEY_BYTES = BLOCK_K * HALF_ROW;  // one K or V tile
// Blocks of a 16-bit kernel that a multiprocessor has shared memory for.
constexpr int RESIDENT_BLOCKS = FAST_MMA || HEAD_DIM == 64 ? 2 : 1;
// What keeps every compiler within 255 registers: other unrolling makes some spill a few of them.
constexpr int SCORE_UNROLL =
    SLA2_ARCH == 100 ? 4 : (SLA2_ARCH == 80 || SLA2_ARCH == 120 ? 2 : HEAD_DIM / 16);

// s = Q K^T of the warp's rows from row0 and the BLOCK_K keys of a tile.
template <int UNROLL>
SLA2_INLINE void score_keys(float (&s)[FWD_M_TILES][KEY_TILES][4], const unsigned char* q_tile,
                            int row0, const unsigned char* k_tile) {
#pragma unroll
    for (int m = 0; m < FWD_M_TILES; ++m) clear(s[m]);
#pragma unroll UNROLL
    for (int c = 0; c < HEAD_DIM / 16; ++c) {
        unsigned a[FWD_M_TILES][4];
#pragma unroll
        for (int m = 0; m < FWD_M_TILES; ++m)
            load_a<HALF_ROW>(a[m], q_tile, row0 + 16 * m, 2 * c);
#pragma unroll
        for (int n = 0; n < KEY_TILES; n += 2) {
            unsigned b[4];
            load_b<HALF_ROW>(b, k_tile, 8 * n, 2 * c);
#pragma unroll
            for (int m = 0; m < FWD_M_TILES; ++m) {
                mma_half(s[m][n], a[m], &b[0]);
                mma_half(s[m][n + 1], a[m], &b[2]);
            }
        }
    }
}

// o += P V, P of the warp's rows and the BLOCK_K values of a tile.
SLA2_INLINE void add_values(float (&o)[FWD_M_TILES][D_TILES][4],
                            const float (&p)[FWD_M_TILES][KEY_TILES][4],
                            const unsigned char* v_tile) {
#pragma unroll
    for (int c = 0; c < BLOCK_K / 16; ++c) {
        unsigned a[FWD_M_TILES][4];
#pragma unroll
        for (int m = 0; m < FWD_M_TILES; ++m)
            // The accumulators of two 8-key tiles are the A operand of 16 keys, as they lie:
            // register r is row g + 8 (r & 1) of the left (r < 2) or the right tile.
#pragma unroll
            for (int r = 0; r < 4; ++r)
                a[m][r] = pack_half(p[m][2 * c + (r >> 1)][2 * (r & 1)],
                                    p[m][2 * c + (r >> 1)][2 * (r & 1) + 1]);
#pragma unroll
        for (int n = 0; n < D_TILES; n += 2) {
            unsigned b[4];
            load_b_trans<HALF_ROW>(b, v_tile, 16 * c, 8 * n);
#pragma unroll
            for (int m = 0; m < FWD_M_TILES; ++m) {
                mma_half(o[m][n], a[m], &b[0]);
                mma_half(o[m][n + 1], a[m], &b[2]);
            }
        }
    }
}

// The selected blocks of a row block: `steps` of them hold a key that counts, of the `length` keys
// that do.
struct Selection {
    const int* list;  // ascending
    int steps;
    int length;
};

// Of row block `block`, counted over all heads; `length`: valid keys.
SLA2_INLINE Selection selection(const int* indices, const int* counts, int max_selected,
                                long long block, int length) {
    Selection found;
    found.list = indices + block * max_selected;
    found.steps = blocks_with_keys(found.list, counts[block], length);
    found.length = length;
    return found;
}

// The online softmax of a row block over its selected blocks. q, k and v point to the head's
// first token, rows of Q from the block's first are `rows`. K of step t + 1 travels during Q K^T of
// step t, V of step t + 1 during P V of step t: README.md, "The cp.async ring". What is to follow
// the last K and V in their rings, `next_k(slot)` and `next_v(slot)` may copy there; their group
// and that of V are under way at the end.
template <int UNROLL, typename NextK, typename NextV>
SLA2_INLINE void attend_selected(float (&o)[FWD_M_TILES][D_TILES][4],
                                 OnlineSoftmax<FWD_M_TILES>& softmax, float scale,
                                 const Selection& blocks, const half_bits* q, int q_step, int rows,
                                 const half_bits* k, int k_step, const half_bits* v, int v_step,
                                 unsigned char* q_tile, unsigned char* k_ring,
                                 unsigned char* v_ring, NextK next_k, NextV next_v) {
    const int* list = blocks.list;
    const int steps = blocks.steps, length = blocks.length;
    const int row0 = threadIdx.x / 32 * FWD_WARP_ROWS;
    int next = 0, tail = BLOCK_K;  // key block of the next step; valid keys of the last one
    if (steps > 0) {
        const int block = list[0];
        next = steps > 1 ? list[1] : 0;
        tail = length - list[steps - 1] * BLOCK_K;
        const long long at = static_cast<long long>(block) * BLOCK_K;
        // Two groups of copies before the loop: Q with the first K, then the first V.
        load_tile<BLOCK_Q, HALF_ROW, FWD_THREADS>(q_tile, q, 2 * q_step, rows);
        load_tile<BLOCK_K, HALF_ROW, FWD_THREADS>(k_ring, k + at * k_step, 2 * k_step,
                                                  length - block * BLOCK_K);
        cp_async_commit();
        load_tile<BLOCK_K, HALF_ROW, FWD_THREADS>(v_ring, v + at * v_step, 2 * v_step,
                                                  length - block * BLOCK_K);
        cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        const unsigned char* k_tile = k_ring + (step & 1) * KEY_BYTES;
        const unsigned char* v_tile = v_ring + (step & 1) * KEY_BYTES;
        const int other = ((step + 1) & 1) * KEY_BYTES;
        const int next_at = next * BLOCK_K, next_valid = length - next_at;
        const bool more = step + 1 < steps;

        // All groups but the newest, which is V of this step, have landed: K is here. The barrier
        // makes every thread's copies visible, and tells that nobody reads the other K slot now.
        cp_async_wait<1>();
        __syncthreads();
        if (more)
            load_tile<BLOCK_K, HALF_ROW, FWD_THREADS>(k_ring + other,
                                                      k + static_cast<long long>(next_at) * k_step,
                                                      2 * k_step, next_valid);
        else
            next_k(k_ring + other);
        // Committed even if empty, so that "all but the newest" means the same in the last step.
        cp_async_commit();

        float s[FWD_M_TILES][KEY_TILES][4];
        score_keys<UNROLL>(s, q_tile, row0, k_tile);
        // Indices ascend, so only the last block can hold keys that do not count.
        if (!more && tail < BLOCK_K) mask_tail(s, tail);
        // P up to 2^8 is harmless in 16 bit and in the fp32 sums, and saves most rescaling of o.
        softmax.update(s, o, scale, 8.0f);

        // The same for V: the newest group is K of the next step.
        cp_async_wait<1>();
        __syncthreads();
        if (more)
            load_tile<BLOCK_K, HALF_ROW, FWD_THREADS>(v_ring + other,
                                                      v + static_cast<long long>(next_at) * v_step,
                                                      2 * v_step, next_valid);
        else
            next_v(v_ring + other);
        cp_async_commit();
        next = step + 2 < steps ? list[step + 2] : 0;
        add_values(o, s, v_tile);
    }
}
