// What producer and consumers of a persistent block share: whose turn a stage is, and which query
// block comes next.
#pragma once

#include "sm90/panels.cuh"

// A stage of a ring and the parity of the phase in which it is used. The consumer waits for the
// parity at the stage's "full", the producer for the other one at its "empty".
template <int STAGES>
struct Turn {
    int stage = 0;
    unsigned parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// One query block of one head, as producer and consumers see it alike.
struct Work {
    long long bh;
    int row_block, item, head, first_row;
    int rows;         // of the block, those before n_q
    int length;       // valid keys of the item
    const int* list;  // its key blocks
    int steps;        // how many of them hold a key that counts
    bool rest;        // whether any block with keys is not selected
};

// Query blocks are numbered head by head, so that blocks of threads that run at the same time share
// a head's K and V in L2.
SLA2_INLINE Work work_of(int number, const int* indices, const int* counts, int max_selected,
                         const int* kv_lengths, int num_heads, int t_m, int n_q, int n_k) {
    Work w;
    const int pair = number / t_m;
    w.bh = pair, w.row_block = number % t_m;
    w.item = pair / num_heads, w.head = pair % num_heads;
    w.first_row = w.row_block * BLOCK_Q;
    w.rows = n_q - w.first_row < BLOCK_Q ? n_q - w.first_row : BLOCK_Q;
    w.length = valid_keys(kv_lengths, w.item, n_k);
    w.list = indices + static_cast<long long>(number) * max_selected;
    w.steps = blocks_with_keys(w.list, counts[number], w.length);
    w.rest = w.steps < ceil_div(w.length, BLOCK_K);
    return w;
}

// The barriers of the K and V rings, which the Barriers of each kernel have: one arrival fills a
// stage, two warpgroups empty it.
template <int STAGES, class Barriers>
SLA2_INLINE void init_key_rings(Barriers& barriers) {
    for (int i = 0; i < STAGES; ++i) {
        mbarrier_init(&barriers.k_full[i], 1), mbarrier_init(&barriers.v_full[i], 1);
        mbarrier_init(&barriers.k_empty[i], 2), mbarrier_init(&barriers.v_empty[i], 2);
    }
}

// The same and those of H.
template <int STAGES, class Barriers>
SLA2_INLINE void init_rings(Barriers& barriers) {
    init_key_rings<STAGES>(barriers);
    mbarrier_init(&barriers.state_full, STATE_THREADS);
    mbarrier_init(&barriers.state_empty, 8);
}

// Brings a tile of K and one of V, of BYTES, into the rings at k_ring and v_ring, whose stages take
// STAGE_BYTES; run by one thread of the producer.
template <int BYTES, int STAGE_BYTES, int STAGES, class Barriers>
SLA2_INLINE void bring_tiles(const unsigned char* k_tile, const unsigned char* v_tile,
                             unsigned char* k_ring, unsigned char* v_ring, Barriers& barriers,
                             Turn<STAGES>& turn) {
    const int i = turn.stage;
    mbarrier_wait(&barriers.k_empty[i], turn.parity ^ 1);
    mbarrier_arrive_expect(&barriers.k_full[i], BYTES);
    bulk_load(k_ring + i * STAGE_BYTES, k_tile, BYTES, &barriers.k_full[i]);
    mbarrier_wait(&barriers.v_empty[i], turn.parity ^ 1);
    mbarrier_arrive_expect(&barriers.v_full[i], BYTES);
    bulk_load(v_ring + i * STAGE_BYTES, v_tile, BYTES, &barriers.v_full[i]);
    turn.next();
}

// The key blocks of a query block.
template <int BYTES, int STAGE_BYTES, int STAGES, class Barriers>
SLA2_INLINE void bring_keys(const Work& w, int t_n, const unsigned char* k_tiles,
                            const unsigned char* v_tiles, unsigned char* k_ring,
                            unsigned char* v_ring, Barriers& barriers, Turn<STAGES>& turn) {
    for (int step = 0; step < w.steps; ++step) {
        const long long at = (w.bh * t_n + w.list[step]) * BYTES;
        bring_tiles<BYTES, STAGE_BYTES>(k_tiles + at, v_tiles + at, k_ring, v_ring, barriers, turn);
    }
}
