// What the sparse forwards on Hopper share, in 16 and in 8 bit: what they read, the tiles that a
// complement brings, and the steps of a consumer over 16-bit tiles, selected or pooled.
#pragma once

#include "pooled_keys.cuh"
#include "sm90/rows.cuh"

constexpr int STAGES = 3;
constexpr int D_WORDS = HEAD_DIM / 2;  // accumulators of a lane: 64 rows x D over 128 lanes

// q may lie in any layout with adjacent channels (strides: item, head, token); k_tiles and v_tiles
// (B H, T_n, a tile) lie as sla2_sm90_pack and sla2_sm90_pack_low write them; `blocks` = B H T_m
// query blocks.
struct Inputs {
    const half_bits* q;
    long long q_item, q_head;
    int q_step;
    const unsigned char* k_tiles;
    const unsigned char* v_tiles;
    const int* indices;
    const int* counts;
    int max_selected;
    const int* kv_lengths;
    int num_heads, n_q, n_k, blocks;
    float softmax_scale;

    __device__ __forceinline__ Work work(int number) const {
        return work_of(number, indices, counts, max_selected, kv_lengths, num_heads,
                       ceil_div(n_q, BLOCK_Q), n_q, n_k);
    }
};

// The linear complement: state (B H, T_m, D, D) and norm (B H, T_m, D), or null: O = O_s.
struct Linear {
    static constexpr bool POOLED = false;
    const half_bits* state;
    const float* norm;
};

// The pooled one: mean (B H, D) of K, which pooled keys and L leave out and the tiles of K do not,
// or null; k_tiles and v_tiles of pooled keys (B H, ceil(T_n / BLOCK_K), BLOCK_K x D), zeros from
// T_n on; bits (B H, T_m, ceil(T_n / 32)); bias: b of each row block, with its strides.
struct Pooled {
    static constexpr bool POOLED = true;
    const float* mean;
    const unsigned char* k_tiles;
    const unsigned char* v_tiles;
    const unsigned* bits;
    const float* bias;
    int bias_stride_b, bias_stride_h, bias_stride_row;

    __device__ __forceinline__ PooledBlocks blocks_of(const Work& w, int number, int n_k) const {
        return pooled_blocks(bits, number, w.steps, w.length, n_k);
    }

    __device__ __forceinline__ float bias_of(const Work& w) const {
        return bias[w.item * bias_stride_b + w.head * bias_stride_h +
                    w.row_block * bias_stride_row];
    }
};

// Brings the tiles of pooled keys of a query block into rings of 16-bit tiles.
template <class Barriers>
SLA2_INLINE void bring_pooled(const Pooled& complement, const Work& w, int number, int n_k,
                              unsigned char* k_ring, unsigned char* v_ring, Barriers& barriers,
                              Turn<STAGES>& turn) {
    const int tiles = complement.blocks_of(w, number, n_k).tiles;
    const long long first = w.bh * ceil_div(ceil_div(n_k, BLOCK_K), BLOCK_K);
    for (int t = 0; t < tiles; ++t) {
        const long long at = (first + t) * KEY_BYTES;
        bring_tiles<KEY_BYTES, KEY_BYTES>(complement.k_tiles + at, complement.v_tiles + at, k_ring,
                                          v_ring, barriers, turn);
    }
}

// Brings H and Z of all query blocks of a block of threads, by warps 1 to 3.
template <class Barriers>
SLA2_INLINE void bring_states(const Linear& complement, const Inputs& in,
                              unsigned char* state_tile, unsigned char* norm_row,
                              Barriers& barriers) {
    if (complement.state == nullptr) return;
    Turn<1> turn;
    for (int number = blockIdx.x; number < in.blocks; number += gridDim.x) {
        const Work w = in.work(number);
        if (!w.rest) continue;
        mbarrier_wait(&barriers.state_empty, turn.parity ^ 1);
        turn.next();
        bring_state(complement.state, complement.norm, number, state_tile, norm_row,
                    &barriers.state_full);
    }
}

// s = Q K^T of one tile; the caller commits.
SLA2_INLINE void issue_scores(float (&s)[32], const unsigned (&q)[HEAD_DIM / 16][4],
                              const unsigned char* k_tile) {
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; ++c)
        wgmma_half<K_MAJOR>(s, q[c], channels_of<BLOCK_K>(k_tile, c), c != 0);
}

// o += P V of one tile.
SLA2_INLINE void issue_values(float (&o)[D_WORDS], const unsigned (&p)[BLOCK_K / 16][4],
                              const unsigned char* v_tile) {
#pragma unroll
    for (int c = 0; c < BLOCK_K / 16; ++c)
        wgmma_half<MN_MAJOR>(o, p[c], rows_of<BLOCK_K>(v_tile, c), 1);
}

// The online softmax of the warp's rows, of which `a` holds Q, goes on over 16-bit tiles in the
// rings, one or more: `steps` selected blocks, of whose last `tail` keys count, and if POOLED tiles
// of pooled keys behind them. Between the two, maxima become less by `lower`, by row: by what is
// not added to the scores of pooled keys. Offsets into shared memory are constants, and pointers
// are made of them where they are used: so ptxas folds them into addresses.
template <bool POOLED, class Barriers>
SLA2_INLINE void attend_tiles(float (&o)[D_WORDS], OnlineSoftmax<1>& softmax,
                              const unsigned (&a)[HEAD_DIM / 16][4], unsigned char* shared,
                              int k_at, int v_at, int barriers_at, Turn<STAGES>& k_turn,
                              Turn<STAGES>& v_turn, int steps, int tail,
                              const PooledBlocks& pooled, const float (&lower)[2],
                              float softmax_scale) {
    const bool lead = (threadIdx.x & 127) == 0;  // of the warpgroup
    const float scale = softmax_scale * LOG2_E;
    float s[32], keep[2];
    unsigned p[BLOCK_K / 16][4];
    const auto mask_selected = [&](int step) {
        if (step + 1 == steps && tail < BLOCK_K) mask_keys(s, tail);
    };
    const auto mask_pooled = [&](int t, const unsigned(&words)[2]) {
        pooled_logits(tiles_of(s), pooled, t, softmax_scale,
                      [&](int column) { return words[column >> 5 & 1]; });
    };
    {
        Barriers& barriers = *reinterpret_cast<Barriers*>(shared + barriers_at);
        mbarrier_wait(&barriers.k_full[k_turn.stage], k_turn.parity);
        wgmma_fence();
        issue_scores(s, a, shared + k_at + k_turn.stage * KEY_BYTES);
        wgmma_commit();
        wgmma_wait<0>();
        if (lead) mbarrier_arrive(&barriers.k_empty[k_turn.stage]);
        k_turn.next();
    }
    if (!POOLED || steps > 0) {
        mask_selected(0);
    } else {
        const unsigned words[2] = {map_word(pooled, 0), map_word(pooled, 32)};
        mask_pooled(0, words);
    }
    // P up to 2^8 is harmless in 16 bit and saves most rescaling of o.
    next_weights(softmax, s, keep, scale, 8.0f);
    pack_operand(p, s);
    // Scores of a step run before P V of the step before, whose weights they turn into under it.
    const auto advance = [&](auto mask) {
        Barriers& barriers = *reinterpret_cast<Barriers*>(shared + barriers_at);
        mbarrier_wait(&barriers.k_full[k_turn.stage], k_turn.parity);
        mbarrier_wait(&barriers.v_full[v_turn.stage], v_turn.parity);
        settle(o);
        for (auto& x : p) settle(x);
        wgmma_fence();
        issue_scores(s, a, shared + k_at + k_turn.stage * KEY_BYTES);
        wgmma_commit();
        issue_values(o, p, shared + v_at + v_turn.stage * KEY_BYTES);
        wgmma_commit();
        wgmma_wait<1>();  // the scores
        if (lead) mbarrier_arrive(&barriers.k_empty[k_turn.stage]);
        k_turn.next();
        mask();
        const bool moved = next_weights(softmax, s, keep, scale, 8.0f);
        wgmma_wait<0>();  // P V
        if (lead) mbarrier_arrive(&barriers.v_empty[v_turn.stage]);
        v_turn.next();
        if (moved) scale_rows(o, keep[0], keep[1]);
        pack_operand(p, s);
    };
    for (int step = 1; step < steps; ++step) advance([&] { mask_selected(step); });
    if constexpr (POOLED) {
        if (steps > 0)
#pragma unroll
            for (int r = 0; r < 2; ++r) softmax.maximum[0][r] -= lower[r];
        for (int t = steps > 0 ? 0 : 1; t < pooled.tiles; ++t) {
            const int first = t * BLOCK_K;  // the words travel while scores are computed
            const unsigned words[2] = {map_word(pooled, first), map_word(pooled, first + 32)};
            advance([&] { mask_pooled(t, words); });
        }
    }
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + barriers_at);
    mbarrier_wait(&barriers.v_full[v_turn.stage], v_turn.parity);
    wgmma_fence();
    issue_values(o, p, shared + v_at + v_turn.stage * KEY_BYTES);
    wgmma_commit();
    wgmma_wait<0>();
    if (lead) mbarrier_arrive(&barriers.v_empty[v_turn.stage]);
    v_turn.next();
}
