// Block-sparse attention in 8 bit on Hopper (int8 or FP8 Q K^T, FP8 or int8 P V); roles, pipeline
// and epilogue as in 16 bit, in which pooled keys are.
#include "formats.cuh"
#include "sm90/forward.cuh"

constexpr int Q_STAGES = 2;
constexpr int BYTE_PITCH = HEAD_DIM + 16;         // bytes of a row of 8-bit Q
constexpr int TILE_BYTES = BLOCK_K * HEAD_DIM;    // one K tile, or one V^T tile (D rows of keys)

struct Barriers {
    unsigned long long k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    unsigned long long q_full[Q_STAGES], q_empty[Q_STAGES], state_full, state_empty;
};

// What 8-bit values of Q (B H, T_m), K (B H, T_n) and V (B H, D) are multiplied by.
struct Scales {
    const float* q;
    const float* k;
    const float* v;
};

// Accumulators of 8-bit products, as floats: the sum and BIAS. int32 sums that start at BIAS_BITS
// are the floats 12582912 + sum, bit for bit, while |sum| < 2^22 (128 * 127 * 127 is less).
template <bool FP8, int WORDS>
struct Sums {
    static constexpr int BIAS_BITS = 0x4b400000;
    static constexpr float BIAS = 12582912.0f;
    int c[WORDS];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) c[i] = BIAS_BITS;
    }
    __device__ __forceinline__ void multiply(const unsigned (&a)[4], descriptor_bits b, int) {
        wgmma_s8(c, a, b, 1);
    }
    __device__ __forceinline__ float biased(int i) const { return __int_as_float(c[i]); }
};

template <int WORDS>
struct Sums<true, WORDS> {
    static constexpr float BIAS = 0.0f;
    float c[WORDS];
    __device__ __forceinline__ void clear() {}
    __device__ __forceinline__ void multiply(const unsigned (&a)[4], descriptor_bits b, int more) {
        wgmma_e4m3(c, a, b, more);
    }
    __device__ __forceinline__ float biased(int i) const { return c[i]; }
};

using Scores = Sums<QK_FP8, 32>;

// Q K^T of one tile: rows of HEAD_DIM bytes.
SLA2_INLINE void issue_scores(Scores& s, const unsigned (&q)[HEAD_DIM / 32][4],
                              const unsigned char* k_tile) {
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 32; ++c)
        s.multiply(q[c], matrix_descriptor<HEAD_DIM>(k_tile + 32 * c, 16, 8 * HEAD_DIM), c != 0);
}

// P V of one tile: D rows of BLOCK_K keys.
SLA2_INLINE void issue_values(Sums<PV_FP8, D_WORDS>& t, const unsigned (&p)[BLOCK_K / 32][4],
                              const unsigned char* v_tile) {
#pragma unroll
    for (int c = 0; c < BLOCK_K / 32; ++c)
        t.multiply(p[c], matrix_descriptor<BLOCK_K>(v_tile + 32 * c, 16, 8 * BLOCK_K), c != 0);
}

// o = o keep + P V of one tile, whose sums are its own because FP8 tensor cores keep fewer bits
// than fp32. `keep`, by row, is what has become of the maximum since the tile before.
SLA2_INLINE void add_values(float (&o)[D_WORDS], const Sums<PV_FP8, D_WORDS>& values,
                            const float (&keep)[1][2]) {
#pragma unroll
    for (int i = 0; i < D_WORDS; ++i)
        o[i] = __fmaf_rn(o[i], keep[0][i >> 1 & 1], values.biased(i) - values.BIAS);
}

// Register r of a 32-key A operand: keys 2 q, 2 q + 1 of one 8-key tile and of the next
// (permuted_key).
SLA2_INLINE void pack_weights(unsigned (&p)[BLOCK_K / 32][4], const float (&s)[32]) {
#pragma unroll
    for (int c = 0; c < BLOCK_K / 32; ++c)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int e = 16 * c + 8 * (r >> 1) + 2 * (r & 1);
            p[c][r] = pack_bytes<PV_FP8>(s[e], s[e + 1], s[e + 4], s[e + 5]);
        }
}

// The warp's 16 rows of Q in 8 bit, from 16-bit rows PITCH apart to rows BYTE_PITCH apart.
SLA2_INLINE void quantize_queries(unsigned char* bytes, const unsigned char* rows, int row0,
                                  float scale) {
    const int lane = threadIdx.x & 31;
    const Divisor by(scale);
    __syncwarp();  // the warp has read what it stored here before
#pragma unroll 4
    for (int i = lane; i < 16 * HALF_CHUNKS; i += 32) {
        const int row = row0 + i / HALF_CHUNKS, chunk = i % HALF_CHUNKS;
        *reinterpret_cast<uint2*>(bytes + row * BYTE_PITCH + 8 * chunk) = quantized_chunk(
            *reinterpret_cast<const uint4*>(rows + row * PITCH + 16 * chunk), by);
    }
    __syncwarp();
}

// 384 threads, at most one block of them a multiprocessor.
template <class Complement>
SLA2_INLINE void attend(const Inputs& in, const Scales& scales, const Results& results,
                        const Complement& complement) {
    constexpr bool POOLED = Complement::POOLED;
    // Stages take a tile of pooled keys, too. Shared memory, in bytes; tiles of wgmma begin at
    // multiples of 1024.
    constexpr int STAGE_BYTES = POOLED ? KEY_BYTES : TILE_BYTES;
    constexpr int K_AT = 0;
    constexpr int V_AT = K_AT + STAGES * STAGE_BYTES;
    constexpr int STATE_AT = V_AT + STAGES * STAGE_BYTES;
    constexpr int Q_AT = STATE_AT + (POOLED ? 0 : HEAD_DIM * HALF_ROW);  // Q in 16 bit
    constexpr int Q_BYTES_AT = Q_AT + Q_STAGES * BLOCK_Q * PITCH;  // and in 8, each warp its rows
    constexpr int OUT_AT = Q_BYTES_AT + BLOCK_Q * BYTE_PITCH;
    constexpr int NORM_AT = OUT_AT + BLOCK_Q * PITCH;
    constexpr int BARRIERS_AT = NORM_AT + (POOLED ? 0 : HEAD_DIM * 4);
    SLA2_ALIGNED_SHARED(shared);
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + BARRIERS_AT);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int t_n = ceil_div(in.n_k, BLOCK_K);
    if (threadIdx.x == 0) {
        init_rings<STAGES>(barriers);
        for (int i = 0; i < Q_STAGES; ++i)
            mbarrier_init(&barriers.q_full[i], 1), mbarrier_init(&barriers.q_empty[i], 8);
        fence_proxy_async();
    }
    __syncthreads();

    if (warp < 4) {
        setmaxnreg_dec<40>();
        if (warp == 0) {  // Q, K and V by bulk copies
            const bool lead = elect_one();
            Turn<STAGES> turn;
            Turn<Q_STAGES> q_turn;
            for (int number = blockIdx.x; number < in.blocks; number += gridDim.x) {
                const Work w = in.work(number);
                unsigned long long* full = &barriers.q_full[q_turn.stage];
                mbarrier_wait(&barriers.q_empty[q_turn.stage], q_turn.parity ^ 1);
                if (lead) mbarrier_arrive_expect(full, w.rows * HALF_ROW);
                for (int row = lane; row < w.rows; row += 32) {
                    const long long token = w.first_row + row;
                    bulk_load(shared + Q_AT + (q_turn.stage * BLOCK_Q + row) * PITCH,
                              in.q + w.item * in.q_item + w.head * in.q_head + token * in.q_step,
                              HALF_ROW, full);
                }
                q_turn.next();
                if (lead) {
                    bring_keys<TILE_BYTES, STAGE_BYTES>(w, t_n, in.k_tiles, in.v_tiles,
                                                        shared + K_AT, shared + V_AT, barriers,
                                                        turn);
                    if constexpr (POOLED)
                        bring_pooled(complement, w, number, in.n_k, shared + K_AT, shared + V_AT,
                                     barriers, turn);
                }
                __syncwarp();
            }
        } else if constexpr (!POOLED) {
            bring_states(complement, in, shared + STATE_AT, shared + NORM_AT, barriers);
        }
        return;
    }

    setmaxnreg_inc<232>();
    const bool lead = (threadIdx.x & 127) == 0;  // of the warpgroup
    const int row0 = 16 * (warp - 4), column = (lane & 3) * 2;
    Turn<STAGES> k_turn, v_turn;
    Turn<Q_STAGES> q_turn;
    Turn<1> state_turn;
    for (int number = blockIdx.x; number < in.blocks; number += gridDim.x) {
        const Work w = in.work(number);
        const float row_scale = in.softmax_scale * scales.q[number];
        const float scale = row_scale * LOG2_E;
        const float* key_scale = scales.k + w.bh * t_n;
        mbarrier_wait(&barriers.q_full[q_turn.stage], q_turn.parity);

        float o[D_WORDS];
#pragma unroll
        for (int i = 0; i < D_WORDS; ++i) o[i] = 0.0f;
        OnlineSoftmax<1> softmax;
        softmax.init();
        if (w.steps > 0) {
            const int tail = w.length - w.list[w.steps - 1] * BLOCK_K;  // valid keys of the last
            unsigned a[HEAD_DIM / 32][4], p[BLOCK_K / 32][4];
            quantize_queries(shared + Q_BYTES_AT, shared + Q_AT + q_turn.stage * BLOCK_Q * PITCH,
                             row0, scales.q[number]);
            const unsigned char* rows = shared + Q_BYTES_AT + (row0 + (lane & 15)) * BYTE_PITCH;
#pragma unroll
            for (int c = 0; c < HEAD_DIM / 32; ++c)
                ldmatrix_x4(a[c], rows + 16 * (2 * c + (lane >> 4)));
            // What the maxima of the newest and of the tile before it have left of older sums.
            float s[32], keep[1][2], kept[1][2], factor = key_scale[w.list[0]];
            {
                Scores sums;
                sums.clear();
                mbarrier_wait(&barriers.k_full[k_turn.stage], k_turn.parity);
                wgmma_fence();
                issue_scores(sums, a, shared + K_AT + k_turn.stage * STAGE_BYTES);
                wgmma_commit();
                wgmma_wait<0>();
                if (lead) mbarrier_arrive(&barriers.k_empty[k_turn.stage]);
                k_turn.next();
#pragma unroll
                for (int i = 0; i < 32; ++i) s[i] = sums.biased(i);
            }
            if (w.steps == 1 && tail < BLOCK_K) mask_keys(s, tail);
            // P counts up to PV_LIMIT, so it stays in the range of the 8-bit format.
            softmax.update_low(tiles_of(s), kept, scale, factor, Scores::BIAS, LOG2_PV_LIMIT);
            pack_weights(p, s);
            // As in 16 bit.
            Sums<PV_FP8, D_WORDS> values;
            for (int step = 1; step < w.steps; ++step) {
                Scores sums;
                sums.clear(), values.clear();
                factor = key_scale[w.list[step]];
                mbarrier_wait(&barriers.k_full[k_turn.stage], k_turn.parity);
                mbarrier_wait(&barriers.v_full[v_turn.stage], v_turn.parity);
                settle(values.c);
                for (auto& x : p) settle(x);
                wgmma_fence();
                issue_scores(sums, a, shared + K_AT + k_turn.stage * STAGE_BYTES);
                wgmma_commit();
                issue_values(values, p, shared + V_AT + v_turn.stage * STAGE_BYTES);
                wgmma_commit();
                wgmma_wait<1>();  // the scores
                if (lead) mbarrier_arrive(&barriers.k_empty[k_turn.stage]);
                k_turn.next();
#pragma unroll
                for (int i = 0; i < 32; ++i) s[i] = sums.biased(i);
                if (step + 1 == w.steps && tail < BLOCK_K) mask_keys(s, tail);
                softmax.update_low(tiles_of(s), keep, scale, factor, Scores::BIAS, LOG2_PV_LIMIT);
                wgmma_wait<0>();  // P V
                if (lead) mbarrier_arrive(&barriers.v_empty[v_turn.stage]);
                v_turn.next();
                add_values(o, values, kept);
                kept[0][0] = keep[0][0], kept[0][1] = keep[0][1];
                pack_weights(p, s);
            }
            values.clear();
            mbarrier_wait(&barriers.v_full[v_turn.stage], v_turn.parity);
            wgmma_fence();
            issue_values(values, p, shared + V_AT + v_turn.stage * STAGE_BYTES);
            wgmma_commit();
            wgmma_wait<0>();
            if (lead) mbarrier_arrive(&barriers.v_empty[v_turn.stage]);
            v_turn.next();
            add_values(o, values, kept);
            // V's scale belongs to the channel, a column of o. Pooled keys count P in 1.
            constexpr float UNIT = POOLED ? 1.0f / PV_LIMIT : 1.0f;
            const float* channel_scale = scales.v + w.bh * HEAD_DIM + column;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                const float2 by = *reinterpret_cast<const float2*>(channel_scale + 8 * n);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    o[4 * n + e] *= (e & 1 ? by.y : by.x) * UNIT;
                }
            }
        }

        unsigned half[HEAD_DIM / 16][4];  // Q in 16 bit, then phi(Q)
        const unsigned char* q_rows = shared + Q_AT + q_turn.stage * BLOCK_Q * PITCH;
        bool some = w.steps > 0, linear = false;
        float score_scale = row_scale, unit = LOG2_PV_LIMIT * LN_2;
        if constexpr (POOLED) {
            const PooledBlocks pooled = complement.blocks_of(w, number, in.n_k);
            const float whole =
                log_size(BLOCK_K, complement.bias_of(w), in.softmax_scale);
            if (some)  // maxima and sums in the units of pooled keys
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    softmax.maximum[0][r] = softmax.maximum[0][r] * scales.q[number] - whole;
                    softmax.sum[0][r] *= 1.0f / PV_LIMIT;
                }
            if (pooled.tiles > 0) {
                load_q(half, q_rows, row0);
                attend_tiles<true, Barriers>(o, softmax, half, shared, K_AT, V_AT, BARRIERS_AT,
                                             k_turn, v_turn, 0, BLOCK_K, pooled, {},
                                             in.softmax_scale);
                some = true;
            }
            score_scale = in.softmax_scale, unit = -whole * in.softmax_scale;
        } else {
            linear = complement.state != nullptr && w.rest;
            if (linear) load_q(half, q_rows, row0);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&barriers.q_empty[q_turn.stage]);
        q_turn.next();
        mix_and_store(results, w, some, o, softmax, score_scale, unit, linear, half,
                      shared + STATE_AT, reinterpret_cast<const float*>(shared + NORM_AT),
                      shared + OUT_AT, row0, barriers, state_turn);
    }
}

// As sla2_sm90_sparse_fwd. k_tiles and v_tiles (B H, T_n, BLOCK_K x D bytes) from
// sla2_sm90_pack_low; scales (B H, T_m), (B H, T_n), (B H, D).
extern "C" __global__ void __launch_bounds__(384, 1)
sla2_sm90_sparse_fwd_low(const half_bits* __restrict__ q, long long q_item, long long q_head,
                         int q_step, const unsigned char* __restrict__ k_tiles,
                         const unsigned char* __restrict__ v_tiles,
                         const float* __restrict__ q_scale, const float* __restrict__ k_scale,
                         const float* __restrict__ v_scale, const int* __restrict__ indices,
                         const int* __restrict__ counts, int max_selected,
                         const int* __restrict__ kv_lengths, const half_bits* __restrict__ state,
                         const float* __restrict__ norm, const float* __restrict__ alpha,
                         int alpha_stride_b, int alpha_stride_h, int alpha_stride_row,
                         half_bits* out, long long out_item, long long out_head, int out_step,
                         half_bits* out_sparse, float* lse, int num_heads, int n_q, int n_k,
                         int channels, int blocks, float softmax_scale) {
    const Inputs in = {q,      q_item,       q_head,     q_step,    k_tiles, v_tiles, indices,
                       counts, max_selected, kv_lengths, num_heads, n_q,     n_k,     blocks,
                       softmax_scale};
    const Results results = {out, out_item, out_head, out_step, out_sparse, lse, alpha,
                             alpha_stride_b, alpha_stride_h, alpha_stride_row, n_q, channels};
    attend(in, Scales{q_scale, k_scale, v_scale}, results, Linear{state, norm});
}

// As sla2_sm90_pooled_fwd, of the K that k_tiles were made of.
extern "C" __global__ void __launch_bounds__(384, 1)
sla2_sm90_pooled_fwd_low(const half_bits* __restrict__ q, long long q_item, long long q_head,
                         int q_step, const unsigned char* __restrict__ k_tiles,
                         const unsigned char* __restrict__ v_tiles,
                         const float* __restrict__ q_scale, const float* __restrict__ k_scale,
                         const float* __restrict__ v_scale, const int* __restrict__ indices,
                         const int* __restrict__ counts, int max_selected,
                         const int* __restrict__ kv_lengths,
                         const unsigned char* __restrict__ pooled_k,
                         const unsigned char* __restrict__ pooled_v,
                         const unsigned* __restrict__ bits, const float* __restrict__ bias,
                         int bias_stride_b, int bias_stride_h, int bias_stride_row,
                         half_bits* out, long long out_item, long long out_head, int out_step,
                         float* lse, int num_heads, int n_q, int n_k, int blocks,
                         float softmax_scale) {
    const Inputs in = {q,      q_item,       q_head,     q_step,    k_tiles, v_tiles, indices,
                       counts, max_selected, kv_lengths, num_heads, n_q,     n_k,     blocks,
                       softmax_scale};
    const Results results = {out, out_item, out_head, out_step, nullptr, lse, nullptr, 0, 0, 0,
                             n_q, HEAD_DIM};
    attend(in, Scales{q_scale, k_scale, v_scale}, results,
           Pooled{nullptr, pooled_k, pooled_v, bits, bias, bias_stride_b, bias_stride_h,
                  bias_stride_row});
}
