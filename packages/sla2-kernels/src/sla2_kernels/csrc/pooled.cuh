// The pooled complement: one key for each block that a row block does not select, its mean, as
// further tiles of the same online softmax, in 16 bit for every precision.
#pragma once

#include "pooled_keys.cuh"
#include "selected.cuh"

// As SCORE_UNROLL: otherwise some compilers spill.
constexpr int POOLED_UNROLL = SLA2_ARCH == 100 ? 1 : (SLA2_ARCH == 80 ? HEAD_DIM / 16 : 2);

// The pooled keys of a head and what a row block reads of them.
struct PooledKeys : PooledBlocks {
    const half_bits* k;  // (T_n, D): means of K over each block's valid tokens
    const half_bits* v;  // (T_n, D): of V
};

// `block`: the row block, counted over all heads.
SLA2_INLINE PooledKeys pooled_keys(const half_bits* k, const half_bits* v, const unsigned* bits,
                                   const Selection& selected, long long bh, long long block,
                                   int n_k) {
    const int t_n = ceil_div(n_k, BLOCK_K);
    PooledKeys keys;
    static_cast<PooledBlocks&>(keys) =
        pooled_blocks(bits, block, selected.steps, selected.length, n_k);
    keys.k = k + bh * t_n * HEAD_DIM;
    keys.v = v + bh * t_n * HEAD_DIM;
    return keys;
}

// Starts the copy of tile t of the means `x` of K or V; rows past the valid blocks become zeros.
SLA2_INLINE void load_pooled(unsigned char* slot, const half_bits* x, const PooledKeys& keys,
                             int t) {
    load_tile<BLOCK_K, HALF_ROW, FWD_THREADS>(
        slot, x + static_cast<long long>(t) * BLOCK_K * HEAD_DIM, HALF_ROW,
        keys.blocks - t * BLOCK_K);
}

// The online softmax of a row block goes on over its pooled keys. Q lies in q_tile, or travels
// with the first K tile; that and the first V tile are the newest two groups of copies, on their
// way to slot `slot` of the rings. Maxima are raw scores less log_size of a whole block.
SLA2_INLINE void attend_pooled(float (&o)[FWD_M_TILES][D_TILES][4],
                               OnlineSoftmax<FWD_M_TILES>& softmax, float softmax_scale,
                               const PooledKeys& keys, const unsigned char* q_tile,
                               unsigned char* k_ring, unsigned char* v_ring, int slot) {
    const int row0 = threadIdx.x / 32 * FWD_WARP_ROWS;
    for (int t = 0; t < keys.tiles; ++t, slot ^= 1) {
        const int other = (slot ^ 1) * KEY_BYTES;
        const bool more = t + 1 < keys.tiles;

        cp_async_wait<1>();  // K of this step is here
        __syncthreads();
        if (more) load_pooled(k_ring + other, keys.k, keys, t + 1);
        cp_async_commit();

        float s[FWD_M_TILES][KEY_TILES][4];
        score_keys<POOLED_UNROLL>(s, q_tile, row0, k_ring + slot * KEY_BYTES);
        pooled_logits(s, keys, t, softmax_scale,
                      [&](int column) { return map_word(keys, column); });
        softmax.update(s, o, softmax_scale * LOG2_E, 8.0f);

        cp_async_wait<1>();  // V of this step is here
        __syncthreads();
        if (more) load_pooled(v_ring + other, keys.v, keys, t + 1);
        cp_async_commit();
        add_values(o, s, v_ring + slot * KEY_BYTES);
    }
    cp_async_wait<0>();
}

// Ends a row block: normalises and stores O and L. `whole`: log_size of a whole block. `tile`
// (BLOCK_Q x D halves): shared memory of which each warp has read its own rows alone. `out`
// (n_q, D), rows out_step apart, and `lse` (n_q,) are the head's.
SLA2_INLINE void store_joint(float (&o)[FWD_M_TILES][D_TILES][4],
                             OnlineSoftmax<FWD_M_TILES>& softmax, float softmax_scale, float whole,
                             bool some, unsigned char* tile, half_bits* out, int out_step,
                             float* lse, int first_row, int n_q) {
    const int row0 = threadIdx.x / 32 * FWD_WARP_ROWS;
    const int rows = n_q - first_row < BLOCK_Q ? n_q - first_row : BLOCK_Q;
    float shift[FWD_M_TILES][2];
#pragma unroll
    for (int m = 0; m < FWD_M_TILES; ++m) shift[m][0] = shift[m][1] = -whole;
    normalise(o, softmax, shift, softmax_scale, 0.0f, some, lse + first_row, row0, rows);
    store_rows(o, tile, out + static_cast<long long>(first_row) * out_step, out_step, row0, rows);
}
