// Block-sparse attention in 16 bit on Hopper: a producer warpgroup and two consumer warpgroups of
// 64 rows, persistent over query blocks, with the linear branch and the mix in the epilogue.
// README.md draws the pipeline.
#include "sm90/rows.cuh"

constexpr int STAGES = 3;
constexpr int D_WORDS = HEAD_DIM / 2;  // accumulators of a lane: 64 rows x D over 128 lanes

// Shared memory, in bytes; tiles of wgmma begin at multiples of 1024.
constexpr int K_AT = 0;
constexpr int V_AT = K_AT + STAGES * KEY_BYTES;
constexpr int STATE_AT = V_AT + STAGES * KEY_BYTES;
constexpr int Q_AT = STATE_AT + HEAD_DIM * HALF_ROW;
constexpr int OUT_AT = Q_AT + BLOCK_Q * PITCH;
constexpr int NORM_AT = OUT_AT + BLOCK_Q * PITCH;
constexpr int BARRIERS_AT = NORM_AT + HEAD_DIM * 4;

struct Barriers {
    unsigned long long k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    unsigned long long q_full, q_empty, state_full, state_empty;
};

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

// Grid: at most one block a multiprocessor; 384 threads. q and out may lie in any layout with
// adjacent channels (strides: item, head, token); k_tiles and v_tiles (B H, T_n, BLOCK_K x D) come
// from sla2_sm90_pack; state (B H, T_m, D, D) and norm (B H, T_m, D), or null: O = O_s; `channels`
// of D are those of a head; `blocks` = B H T_m query blocks.
extern "C" __global__ void __launch_bounds__(384, 1)
sla2_sm90_sparse_fwd(const half_bits* __restrict__ q, long long q_item, long long q_head,
                     int q_step, const unsigned char* __restrict__ k_tiles,
                     const unsigned char* __restrict__ v_tiles, const int* __restrict__ indices,
                     const int* __restrict__ counts, int max_selected,
                     const int* __restrict__ kv_lengths, const half_bits* __restrict__ state,
                     const float* __restrict__ norm, const float* __restrict__ alpha,
                     int alpha_stride_b, int alpha_stride_h, int alpha_stride_row, half_bits* out,
                     long long out_item, long long out_head, int out_step, half_bits* out_sparse,
                     float* lse, int num_heads, int n_q, int n_k, int channels, int blocks,
                     float softmax_scale) {
    SLA2_ALIGNED_SHARED(shared);
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + BARRIERS_AT);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int t_m = ceil_div(n_q, BLOCK_Q), t_n = ceil_div(n_k, BLOCK_K);
    if (threadIdx.x == 0) {
        init_rings<STAGES>(barriers);
        mbarrier_init(&barriers.q_full, 1), mbarrier_init(&barriers.q_empty, 8);
        fence_proxy_async();
    }
    __syncthreads();

    if (warp < 4) {
        setmaxnreg_dec<40>();
        if (warp == 0) {  // Q, K and V by bulk copies
            const bool lead = elect_one();
            Turn<STAGES> turn;
            Turn<1> q_turn;
            for (int number = blockIdx.x; number < blocks; number += gridDim.x) {
                const Work w = work_of(number, indices, counts, max_selected, kv_lengths,
                                       num_heads, t_m, n_q, n_k);
                const half_bits* q_rows = q + w.item * q_item + w.head * q_head +
                                          static_cast<long long>(w.first_row) * q_step;
                mbarrier_wait(&barriers.q_empty, q_turn.parity ^ 1);
                q_turn.next();
                if (lead) mbarrier_arrive_expect(&barriers.q_full, w.rows * HALF_ROW);
                for (int row = lane; row < w.rows; row += 32)
                    bulk_load(shared + Q_AT + row * PITCH,
                              q_rows + static_cast<long long>(row) * q_step, HALF_ROW,
                              &barriers.q_full);
                if (lead)
                    bring_keys<KEY_BYTES>(w, t_n, k_tiles, v_tiles, shared + K_AT, shared + V_AT,
                                          barriers, turn);
                __syncwarp();
            }
        } else if (state != nullptr) {  // H, which its writer does not swizzle, and Z
            Turn<1> turn;
            for (int number = blockIdx.x; number < blocks; number += gridDim.x) {
                const Work w = work_of(number, indices, counts, max_selected, kv_lengths,
                                       num_heads, t_m, n_q, n_k);
                if (!w.rest) continue;
                mbarrier_wait(&barriers.state_empty, turn.parity ^ 1);
                turn.next();
                bring_state(state, norm, number, shared + STATE_AT, shared + NORM_AT,
                            &barriers.state_full);
            }
        }
        return;
    }

    setmaxnreg_inc<232>();
    const bool lead = (threadIdx.x & 127) == 0;  // of the warpgroup
    const int row0 = 16 * (warp - 4);
    const float scale = softmax_scale * LOG2_E;
    const Results results = {out, out_item, out_head, out_step, out_sparse, lse, alpha,
                             alpha_stride_b, alpha_stride_h, alpha_stride_row, n_q, channels};
    Turn<STAGES> k_turn, v_turn;
    Turn<1> q_turn, state_turn;
    for (int number = blockIdx.x; number < blocks; number += gridDim.x) {
        const Work w = work_of(number, indices, counts, max_selected, kv_lengths, num_heads, t_m,
                               n_q, n_k);
        const bool some = w.steps > 0;
        unsigned a[HEAD_DIM / 16][4];  // Q, then phi(Q)
        mbarrier_wait(&barriers.q_full, q_turn.parity);
        q_turn.next();
        load_q(a, shared + Q_AT, row0);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&barriers.q_empty);

        float o[D_WORDS];
#pragma unroll
        for (int i = 0; i < D_WORDS; ++i) o[i] = 0.0f;
        OnlineSoftmax<1> softmax;
        softmax.init();
        if (some) {
            const int tail = w.length - w.list[w.steps - 1] * BLOCK_K;  // valid keys of the last
            float s[32], keep[2];
            unsigned p[BLOCK_K / 16][4];
            mbarrier_wait(&barriers.k_full[k_turn.stage], k_turn.parity);
            wgmma_fence();
            issue_scores(s, a, shared + K_AT + k_turn.stage * KEY_BYTES);
            wgmma_commit();
            wgmma_wait<0>();
            if (lead) mbarrier_arrive(&barriers.k_empty[k_turn.stage]);
            k_turn.next();
            if (w.steps == 1 && tail < BLOCK_K) mask_keys(s, tail);
            // P up to 2^8 is harmless in 16 bit and saves most rescaling of o.
            next_weights(softmax, s, keep, scale, 8.0f);
            pack_operand(p, s);
            // Scores of step t run before P V of step t - 1, whose weights they turn into under it.
            for (int step = 1; step < w.steps; ++step) {
                mbarrier_wait(&barriers.k_full[k_turn.stage], k_turn.parity);
                mbarrier_wait(&barriers.v_full[v_turn.stage], v_turn.parity);
                settle(o);
                for (auto& x : p) settle(x);
                wgmma_fence();
                issue_scores(s, a, shared + K_AT + k_turn.stage * KEY_BYTES);
                wgmma_commit();
                issue_values(o, p, shared + V_AT + v_turn.stage * KEY_BYTES);
                wgmma_commit();
                wgmma_wait<1>();  // the scores
                if (lead) mbarrier_arrive(&barriers.k_empty[k_turn.stage]);
                k_turn.next();
                if (step + 1 == w.steps && tail < BLOCK_K) mask_keys(s, tail);
                const bool moved = next_weights(softmax, s, keep, scale, 8.0f);
                wgmma_wait<0>();  // P V
                if (lead) mbarrier_arrive(&barriers.v_empty[v_turn.stage]);
                v_turn.next();
                if (moved) scale_rows(o, keep[0], keep[1]);
                pack_operand(p, s);
            }
            mbarrier_wait(&barriers.v_full[v_turn.stage], v_turn.parity);
            wgmma_fence();
            issue_values(o, p, shared + V_AT + v_turn.stage * KEY_BYTES);
            wgmma_commit();
            wgmma_wait<0>();
            if (lead) mbarrier_arrive(&barriers.v_empty[v_turn.stage]);
            v_turn.next();
        }

        mix_and_store(results, w, o, softmax, softmax_scale, 0.0f, state != nullptr && w.rest, a,
                      shared + STATE_AT, reinterpret_cast<const float*>(shared + NORM_AT),
                      shared + OUT_AT, row0, barriers, state_turn);
    }
}
