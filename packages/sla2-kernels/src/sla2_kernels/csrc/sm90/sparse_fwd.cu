// Block-sparse attention in 16 bit on Hopper: a producer warpgroup and two consumer warpgroups of
// 64 rows, persistent over query blocks; with the linear branch and the mix in the epilogue, or
// with a pooled key in the same softmax for each block that is not selected. README.md draws the
// pipeline.
#include "sm90/forward.cuh"

struct Barriers {
    unsigned long long k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    unsigned long long q_full, q_empty, state_full, state_empty;
};

// 384 threads, at most one block of them a multiprocessor.
template <class Complement>
SLA2_INLINE void attend(const Inputs& in, const Results& results, const Complement& complement) {
    constexpr bool POOLED = Complement::POOLED;
    // Shared memory, in bytes; tiles of wgmma begin at multiples of 1024.
    constexpr int K_AT = 0;
    constexpr int V_AT = K_AT + STAGES * KEY_BYTES;
    constexpr int STATE_AT = V_AT + STAGES * KEY_BYTES;
    constexpr int Q_AT = STATE_AT + (POOLED ? 0 : HEAD_DIM * HALF_ROW);
    constexpr int OUT_AT = Q_AT + BLOCK_Q * PITCH;
    constexpr int CHANNELS_AT = OUT_AT + BLOCK_Q * PITCH;  // Z, or the mean of K
    constexpr int BARRIERS_AT = CHANNELS_AT + HEAD_DIM * 4;
    SLA2_ALIGNED_SHARED(shared);
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + BARRIERS_AT);
    const float* channel_row = reinterpret_cast<const float*>(shared + CHANNELS_AT);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
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
            for (int number = blockIdx.x; number < in.blocks; number += gridDim.x) {
                const Work w = in.work(number);
                const half_bits* q_rows = in.q + w.item * in.q_item + w.head * in.q_head +
                                          static_cast<long long>(w.first_row) * in.q_step;
                mbarrier_wait(&barriers.q_empty, q_turn.parity ^ 1);
                q_turn.next();
                int bytes = w.rows * HALF_ROW;
                if constexpr (POOLED)
                    if (complement.mean != nullptr) bytes += HEAD_DIM * 4;
                if (lead) mbarrier_arrive_expect(&barriers.q_full, bytes);
                for (int row = lane; row < w.rows; row += 32)
                    bulk_load(shared + Q_AT + row * PITCH,
                              q_rows + static_cast<long long>(row) * in.q_step, HALF_ROW,
                              &barriers.q_full);
                if (lead) {
                    if constexpr (POOLED)
                        if (complement.mean != nullptr)
                            bulk_load(shared + CHANNELS_AT, complement.mean + w.bh * HEAD_DIM,
                                      HEAD_DIM * 4, &barriers.q_full);
                    bring_keys<KEY_BYTES, KEY_BYTES>(w, ceil_div(in.n_k, BLOCK_K), in.k_tiles,
                                                     in.v_tiles, shared + K_AT, shared + V_AT,
                                                     barriers, turn);
                    if constexpr (POOLED)
                        bring_pooled(complement, w, number, in.n_k, shared + K_AT, shared + V_AT,
                                     barriers, turn);
                }
                __syncwarp();
            }
        } else if constexpr (!POOLED) {
            bring_states(complement, in, shared + STATE_AT, shared + CHANNELS_AT, barriers);
        }
        return;
    }

    setmaxnreg_inc<232>();
    const int row0 = 16 * (warp - 4);
    Turn<STAGES> k_turn, v_turn;
    Turn<1> q_turn, state_turn;
    for (int number = blockIdx.x; number < in.blocks; number += gridDim.x) {
        const Work w = in.work(number);
        PooledBlocks pooled = {};
        // By what pooled keys' logits are more than their scores, and with the rows' products with
        // K's mean.
        float whole = 0.0f, lower[2] = {0.0f, 0.0f};
        if constexpr (POOLED) {
            pooled = complement.blocks_of(w, number, in.n_k);
            whole = log_size(BLOCK_K, complement.bias_of(w), in.softmax_scale);
        }
        unsigned a[HEAD_DIM / 16][4];  // Q, then phi(Q)
        mbarrier_wait(&barriers.q_full, q_turn.parity);
        q_turn.next();
        load_q(a, shared + Q_AT, row0);
        if constexpr (POOLED) {
            if (complement.mean != nullptr) row_products(lower, a, channel_row);
            lower[0] += whole, lower[1] += whole;
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&barriers.q_empty);

        float o[D_WORDS];
#pragma unroll
        for (int i = 0; i < D_WORDS; ++i) o[i] = 0.0f;
        OnlineSoftmax<1> softmax;
        softmax.init();
        const bool some = w.steps > 0 || pooled.tiles > 0;
        if (some) {
            int tail = BLOCK_K;  // valid keys of the last selected block
            if (!POOLED || w.steps > 0) tail = w.length - w.list[w.steps - 1] * BLOCK_K;
            attend_tiles<POOLED, Barriers>(o, softmax, a, shared, K_AT, V_AT, BARRIERS_AT, k_turn,
                                           v_turn, w.steps, tail, pooled, lower,
                                           in.softmax_scale);
        }

        bool linear = false;
        if constexpr (!POOLED) linear = complement.state != nullptr && w.rest;
        mix_and_store(results, w, some, o, softmax, in.softmax_scale,
                      POOLED ? -whole * in.softmax_scale : 0.0f, linear, a, shared + STATE_AT,
                      channel_row, shared + OUT_AT, row0, barriers, state_turn);
    }
}

// out (strides: item, head, token) may lie in any layout as q may; `channels` of D are those of a
// head; out_sparse (B H, n_q, D), or null.
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
    const Inputs in = {q,      q_item,       q_head,     q_step,    k_tiles, v_tiles, indices,
                       counts, max_selected, kv_lengths, num_heads, n_q,     n_k,     blocks,
                       softmax_scale};
    const Results results = {out, out_item, out_head, out_step, out_sparse, lse, alpha,
                             alpha_stride_b, alpha_stride_h, alpha_stride_row, n_q, channels};
    attend(in, results, Linear{state, norm});
}

extern "C" __global__ void __launch_bounds__(384, 1)
sla2_sm90_pooled_fwd(const half_bits* __restrict__ q, long long q_item, long long q_head,
                     int q_step, const unsigned char* __restrict__ k_tiles,
                     const unsigned char* __restrict__ v_tiles, const float* __restrict__ mean,
                     const int* __restrict__ indices, const int* __restrict__ counts,
                     int max_selected, const int* __restrict__ kv_lengths,
                     const unsigned char* __restrict__ pooled_k,
                     const unsigned char* __restrict__ pooled_v,
                     const unsigned* __restrict__ bits, const float* __restrict__ bias,
                     int bias_stride_b, int bias_stride_h, int bias_stride_row, half_bits* out,
                     long long out_item, long long out_head, int out_step, float* lse,
                     int num_heads, int n_q, int n_k, int blocks, float softmax_scale) {
    const Inputs in = {q,      q_item,       q_head,     q_step,    k_tiles, v_tiles, indices,
                       counts, max_selected, kv_lengths, num_heads, n_q,     n_k,     blocks,
                       softmax_scale};
    const Results results = {out, out_item, out_head, out_step, nullptr, lse, nullptr, 0, 0, 0,
                             n_q, HEAD_DIM};
    attend(in, results, Pooled{mean, pooled_k, pooled_v, bits, bias, bias_stride_b,
                               bias_stride_h, bias_stride_row});
}
