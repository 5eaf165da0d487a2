// The selected key blocks of a row block in 8 bit: the main loop of the low-bit forward kernels.
#pragma once

#include "formats.cuh"
#include "selected.cuh"

static_assert(BLOCK_K % 32 == 0, "8-bit products take 32 keys at a time");

// One K tile, and one V^T tile (D rows of BLOCK_K keys).
constexpr int LOW_KEY_BYTES = BLOCK_K * HEAD_DIM;

// An accumulator tile of 8-bit products: int32, or fp32 for FP8, as floats the sum and BIAS. int32
// sums that start at BIAS_BITS are the floats 12582912 + sum, bit for bit, while |sum| < 2^22
// (128 * 127 * 127 is less).
template <bool FP8>
struct Sums {
    static constexpr int BIAS_BITS = 0x4b400000;
    static constexpr float BIAS = 12582912.0f;
    int c[4];
    __device__ __forceinline__ void clear() { c[0] = c[1] = c[2] = c[3] = BIAS_BITS; }
    __device__ __forceinline__ void multiply(const unsigned* a, const unsigned* b) {
        mma_m16n8k32_s8(c, a, b);
    }
    __device__ __forceinline__ float biased(int e) const { return __int_as_float(c[e]); }
};

#if SLA2_ARCH >= 89
template <>
struct Sums<true> {
    static constexpr float BIAS = 0.0f;
    float c[4];
    __device__ __forceinline__ void clear() { c[0] = c[1] = c[2] = c[3] = 0.0f; }
    __device__ __forceinline__ void multiply(const unsigned* a, const unsigned* b) {
        mma_m16n8k32_e4m3(c, a, b);
    }
    __device__ __forceinline__ float biased(int e) const { return c[e]; }
};
#endif

// The query block in 8 bit, from its `rows` rows of Q, step elements apart; zeros past them.
SLA2_INLINE void quantize_queries(unsigned char* tile, const half_bits* q, int step, int rows,
                                  float scale) {
    constexpr int CHUNKS = HEAD_DIM / 8;
    const Divisor by(scale);
#pragma unroll 4
    for (int i = threadIdx.x; i < BLOCK_Q * CHUNKS; i += FWD_THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const long long at = static_cast<long long>(row) * step + 8 * chunk;
        uint2 bytes = {0u, 0u};
        if (row < rows) bytes = quantized_chunk(load_16(q + at), by);
        *reinterpret_cast<uint2*>(tile + tile_offset<HEAD_DIM>(row, chunk / 2) + chunk % 2 * 8) =
            bytes;
    }
}

// o times V's scales, which belong to the channels, columns of o: `scales` (D,), times `unit`.
SLA2_INLINE void scale_channels(float (&o)[FWD_M_TILES][D_TILES][4], const float* scales,
                                float unit) {
    const int column = (threadIdx.x & 3) * 2;  // of the lane's elements 8 n + column and + 1
#pragma unroll
    for (int n = 0; n < D_TILES; ++n)
#pragma unroll
        for (int m = 0; m < FWD_M_TILES; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[m][n][e] *= scales[8 * n + column + (e & 1)] * unit;
}

// The online softmax of a row block over its selected blocks, as attend_selected. k_bytes, v_bytes
// and k_scale are the head's; o is in units of V's channel scales, and the sums count P in units of
// 1 / PV_LIMIT; maxima count in units of query_scale. `next_k()` may copy what the last step's Q
// K^T leaves time for; its group and that of V are under way at the end.
template <typename NextK>
SLA2_INLINE void attend_selected_low(float (&o)[FWD_M_TILES][D_TILES][4],
                                     OnlineSoftmax<FWD_M_TILES>& softmax, float row_scale,
                                     const Selection& blocks, const half_bits* q, int q_step,
                                     int rows, float query_scale, const unsigned char* k_bytes,
                                     const float* k_scale, const unsigned char* v_bytes,
                                     unsigned char* q_tile, unsigned char* k_ring,
                                     unsigned char* v_ring, NextK next_k) {
    const int* list = blocks.list;
    const int steps = blocks.steps, length = blocks.length;
    const int row0 = threadIdx.x / 32 * FWD_WARP_ROWS;
    // Key block of this step and of the next; valid keys of the last one.
    int block = 0, next = 0, tail = BLOCK_K;
    if (steps > 0) {
        block = list[0];
        next = steps > 1 ? list[1] : 0;
        tail = length - list[steps - 1] * BLOCK_K;
        load_tile<BLOCK_K, HEAD_DIM, FWD_THREADS>(
            k_ring, k_bytes + static_cast<long long>(block) * LOW_KEY_BYTES, HEAD_DIM,
            length - block * BLOCK_K);
        cp_async_commit();
        // A V^T tile has D rows, all of them whole: padding keys are zeros already.
        load_tile<HEAD_DIM, BLOCK_K, FWD_THREADS>(
            v_ring, v_bytes + static_cast<long long>(block) * LOW_KEY_BYTES, BLOCK_K, HEAD_DIM);
        cp_async_commit();
        quantize_queries(q_tile, q, q_step, rows, query_scale);  // seen after the first barrier
    }
    for (int step = 0; step < steps; ++step) {
        const unsigned char* k_tile = k_ring + (step & 1) * LOW_KEY_BYTES;
        const unsigned char* v_tile = v_ring + (step & 1) * LOW_KEY_BYTES;
        const int other = ((step + 1) & 1) * LOW_KEY_BYTES;
        const long long next_at = static_cast<long long>(next) * LOW_KEY_BYTES;
        const bool more = step + 1 < steps;
        const float key_scale = k_scale[block];

        cp_async_wait<1>();  // K of this step is here
        __syncthreads();
        if (more)
            load_tile<BLOCK_K, HEAD_DIM, FWD_THREADS>(k_ring + other, k_bytes + next_at, HEAD_DIM,
                                                      length - next * BLOCK_K);
        else
            next_k();
        cp_async_commit();

        float s[FWD_M_TILES][KEY_TILES][4];
        {  // the integer sums live no longer than this
            Sums<QK_FP8> sums[FWD_M_TILES][KEY_TILES];
#pragma unroll
            for (int m = 0; m < FWD_M_TILES; ++m)
#pragma unroll
                for (int n = 0; n < KEY_TILES; ++n) sums[m][n].clear();
#pragma unroll
            for (int c = 0; c < HEAD_DIM / 32; ++c) {
                unsigned a[FWD_M_TILES][4];
#pragma unroll
                for (int m = 0; m < FWD_M_TILES; ++m)
                    load_a<HEAD_DIM>(a[m], q_tile, row0 + 16 * m, 2 * c);
#pragma unroll
                for (int n = 0; n < KEY_TILES; n += 2) {
                    unsigned b[4];
                    load_b<HEAD_DIM>(b, k_tile, 8 * n, 2 * c);
#pragma unroll
                    for (int m = 0; m < FWD_M_TILES; ++m) {
                        sums[m][n].multiply(a[m], &b[0]);
                        sums[m][n + 1].multiply(a[m], &b[2]);
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < FWD_M_TILES; ++m)
#pragma unroll
                for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[m][n][e] = sums[m][n].biased(e);
        }
        if (!more && tail < BLOCK_K) mask_tail(s, tail);
        // P stays in [0, PV_LIMIT], the range of the 8-bit format. The row sums count in the same
        // unit, so it leaves O with the normalisation, and L below.
        float keep[FWD_M_TILES][2];
        softmax.update_low(s, keep, row_scale * LOG2_E, key_scale, Sums<QK_FP8>::BIAS,
                           LOG2_PV_LIMIT);

        cp_async_wait<1>();  // V of this step is here
        __syncthreads();
        if (more)
            load_tile<HEAD_DIM, BLOCK_K, FWD_THREADS>(v_ring + other, v_bytes + next_at, BLOCK_K,
                                                      HEAD_DIM);
        cp_async_commit();

        // Register r of a 32-key A operand holds four keys of row g + 8 (r & 1), of the left
        // (r < 2) or right 16: here keys 2 q, 2 q + 1 of one 8-key tile and of the next, with
        // q = lane mod 4. V^T is stored in that order (permuted_key), so no lane needs another's P.
        unsigned p[BLOCK_K / 32][FWD_M_TILES][4];
#pragma unroll
        for (int c = 0; c < BLOCK_K / 32; ++c)
#pragma unroll
            for (int m = 0; m < FWD_M_TILES; ++m)
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const float* left = &s[m][4 * c + 2 * (r >> 1)][2 * (r & 1)];
                    const float* right = &s[m][4 * c + 2 * (r >> 1) + 1][2 * (r & 1)];
                    p[c][m][r] = pack_bytes<PV_FP8>(left[0], left[1], right[0], right[1]);
                }
        // Each block's product has its own sums and is added in fp32: FP8 tensor cores keep fewer
        // bits than fp32. The same FMA rescales o.
#pragma unroll
        for (int n = 0; n < D_TILES; n += 2) {
            Sums<PV_FP8> sums[FWD_M_TILES][2];
#pragma unroll
            for (int m = 0; m < FWD_M_TILES; ++m) sums[m][0].clear(), sums[m][1].clear();
#pragma unroll
            for (int c = 0; c < BLOCK_K / 32; ++c) {
                unsigned b[4];
                load_b<BLOCK_K>(b, v_tile, 8 * n, 2 * c);
#pragma unroll
                for (int m = 0; m < FWD_M_TILES; ++m) {
                    sums[m][0].multiply(p[c][m], &b[0]);
                    sums[m][1].multiply(p[c][m], &b[2]);
                }
            }
#pragma unroll
            for (int m = 0; m < FWD_M_TILES; ++m)
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        o[m][n + i][e] = __fmaf_rn(o[m][n + i][e], keep[m][e >> 1],
                                                   sums[m][i].biased(e) - Sums<PV_FP8>::BIAS);
        }
        block = next;
        next = step + 2 < steps ? list[step + 2] : 0;
    }
}
