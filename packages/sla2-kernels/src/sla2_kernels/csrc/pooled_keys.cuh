// The logits of pooled keys, one for each block that a row block does not select: what both forward
// kernels of the pooled complement share.
#pragma once

#include "softmax.cuh"

// The pooled keys of a row block.
struct PooledBlocks {
    const unsigned* bits;  // the row block's map (ceil(T_n / 32)): a set bit masks the key
    int length;            // valid tokens
    int blocks;            // those that hold one
    int tiles;             // of BLOCK_K pooled keys; 0: every block is selected
};

// `block`: the row block, counted over all heads, whose selected blocks take `steps`; `length`:
// valid tokens.
SLA2_INLINE PooledBlocks pooled_blocks(const unsigned* bits, long long block, int steps,
                                       int length, int n_k) {
    PooledBlocks pooled;
    pooled.bits = bits + block * ceil_div(ceil_div(n_k, BLOCK_K), 32);
    pooled.length = length;
    pooled.blocks = ceil_div(length, BLOCK_K);
    pooled.tiles = steps < pooled.blocks ? ceil_div(pooled.blocks, BLOCK_K) : 0;
    return pooled;
}

// Word of the map that has pooled key `column`, or the last one.
SLA2_INLINE unsigned map_word(const PooledBlocks& pooled, int column) {
    const int word = column >> 5, words = ceil_div(pooled.blocks, 32);
    return pooled.bits[word < words ? word : words - 1];
}

// log(tokens) + bias in units of raw scores: what a pooled key's logit is more than its score.
SLA2_INLINE float log_size(int tokens, float bias, float softmax_scale) {
    return (logf(static_cast<float>(tokens)) + bias) * inverse_approx(softmax_scale);
}

// Raw scores s of tile t become logits, in their unit and less log_size of a whole block: -inf for
// blocks that are selected or hold no valid token. word(column): map_word.
template <int M_TILES, class Word>
SLA2_INLINE void pooled_logits(float (&s)[M_TILES][BLOCK_K / 8][4], const PooledBlocks& pooled,
                               int t, float softmax_scale, Word word) {
    const int first = t * BLOCK_K, q = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < BLOCK_K / 8; ++n) {
        const int column = first + 8 * n;
        // Columns 2 i and 2 i + 1 of a word are bits i and 16 + i (bit_of).
        const unsigned own = word(column) >> q, even = 1u << (column & 31) / 2;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (own & (e & 1 ? even << 16 : even)) s[m][n][e] = MINUS_INFINITY;
    }
    if (t + 1 < pooled.tiles) return;
    const int left = pooled.blocks - first;
    mask_tail(s, left);
    const int tail = pooled.length - (pooled.blocks - 1) * BLOCK_K;  // tokens of the last block
    const float less = log_size(tail, 0.0f, softmax_scale) - log_size(BLOCK_K, 0.0f, softmax_scale);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (8 * n + 2 * q + (e & 1) == left - 1) s[m][n][e] += less;
}
