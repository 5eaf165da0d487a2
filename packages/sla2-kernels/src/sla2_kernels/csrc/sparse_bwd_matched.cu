// What the matched backward needs besides sparse_bwd.cu: Q, K, V as the low-bit forward saw them,
// and D and the largest P of every row.
#include "sparse_bwd.cuh"

constexpr int ROWS_UNROLL = SLA2_ARCH == 100 ? 2 : HEAD_DIM / 16;  // as DQ_UNROLL

// Q (B H, n_q, D) as the low-bit forward sees it: its 8-bit values, without their scale (B H, T_m),
// in 16 bit, which holds them exactly. Grid (ceil(n_q D / 512), B H), 256 threads, 2 values each.
extern "C" __global__ void __launch_bounds__(256)
sla2_round_queries(const half_bits* __restrict__ q, const float* __restrict__ q_scale,
                   half_bits* __restrict__ out, int n_q) {
    const long long bh = blockIdx.y, base = bh * n_q * HEAD_DIM;
    const int i = (blockIdx.x * 256 + threadIdx.x) * 2, token = i / HEAD_DIM;
    if (token >= n_q) return;
    const Divisor by(q_scale[bh * ceil_div(n_q, BLOCK_Q) + token / BLOCK_Q]);
    const unsigned raw = *reinterpret_cast<const unsigned*>(q + base + i);
    *reinterpret_cast<unsigned*>(out + base + i) =
        pack_half(round_value<QK_FP8>(by.divide(low_half(raw))),
                  round_value<QK_FP8>(by.divide(high_half(raw))));
}

// The 8-bit values of K (rows x D, `count` in all) in the same way. 256 threads, 4 values each.
extern "C" __global__ void __launch_bounds__(256)
sla2_widen(const unsigned char* __restrict__ bytes, half_bits* __restrict__ out, long long count) {
    for (long long i = (blockIdx.x * 256ll + threadIdx.x) * 4; i < count; i += gridDim.x * 1024ll) {
        const unsigned raw = *reinterpret_cast<const unsigned*>(bytes + i);
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const unsigned char byte = static_cast<unsigned char>(raw >> 8 * e);
#if SLA2_ARCH >= 89
            x[e] = QK_FP8 ? e4m3_to_f32(byte) : static_cast<float>(static_cast<signed char>(byte));
#else
            x[e] = static_cast<float>(static_cast<signed char>(byte));
#endif
        }
        uint2 packed;
        packed.x = pack_half(x[0], x[1]), packed.y = pack_half(x[2], x[3]);
        *reinterpret_cast<uint2*>(out + i) = packed;
    }
}

// V (B H, n_k, D) after the round trip through its 8-bit format, in 16 bit; value_scale (B H, D).
// Padding tokens become 0. Grid (ceil(n_k D / 512), B H), 256 threads, 2 values each.
extern "C" __global__ void __launch_bounds__(256)
sla2_round_values(const half_bits* __restrict__ v, const float* __restrict__ value_scale,
                  const int* __restrict__ kv_lengths, half_bits* __restrict__ out,
                  int num_heads, int n_k) {
    const long long bh = blockIdx.y, base = bh * n_k * HEAD_DIM;
    const int length = valid_keys(kv_lengths, blockIdx.y / num_heads, n_k);
    const int i = (blockIdx.x * 256 + threadIdx.x) * 2, token = i / HEAD_DIM;
    if (token >= n_k) return;
    const float* scale = value_scale + bh * HEAD_DIM + i % HEAD_DIM;
    const unsigned raw = *reinterpret_cast<const unsigned*>(v + base + i);
    *reinterpret_cast<unsigned*>(out + base + i) =
        token < length ? pack_half(round_value<PV_FP8>(low_half(raw) / scale[0]) * scale[0],
                                   round_value<PV_FP8>(high_half(raw) / scale[1]) * scale[1])
                       : 0u;
}

// Per query row: row_mean = sum of P dP over the selected keys with the unrounded P, dP = dO V^T,
// which is D over the weight of O_s, and row_top = the largest P; 0 and 1 where nothing is
// selected. Grid and shared memory as sparse_bwd_q.
extern "C" __global__ void __launch_bounds__(DQ_THREADS, 1)
sla2_bwd_matched_rows(const half_bits* __restrict__ q, const half_bits* __restrict__ k,
                      const half_bits* __restrict__ v, const half_bits* __restrict__ grad,
                      const float* __restrict__ lse, const float* __restrict__ q_scale,
                      const float* __restrict__ k_scale, const int* __restrict__ indices,
                      const int* __restrict__ counts, int max_selected,
                      const int* __restrict__ kv_lengths, float* __restrict__ row_mean,
                      float* __restrict__ row_top, int num_heads, int n_q, int n_k,
                      float softmax_scale) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* q_tile = shared;
    unsigned char* grad_tile = q_tile + ROW_BYTES_ALL;
    unsigned char* k_ring = grad_tile + ROW_BYTES_ALL;
    unsigned char* v_ring = k_ring + 2 * KEY_BYTES;

    const int row_block = blockIdx.x / PARTS;
    const long long bh = blockIdx.y;
    const int t_m = gridDim.x / PARTS, first_row = blockIdx.x * ROWS;
    const int length = valid_keys(kv_lengths, blockIdx.y / num_heads, n_k);
    const int* list = indices + (bh * t_m + row_block) * max_selected;
    const int steps =
        blocks_with_keys(list, first_row < n_q ? counts[bh * t_m + row_block] : 0, length);
    k += bh * n_k * HEAD_DIM, v += bh * n_k * HEAD_DIM;
    k_scale += bh * ceil_div(n_k, BLOCK_K);

    const int lane = threadIdx.x & 31, row0 = first_row_of_warp(), g = lane >> 2;
    const int column = (lane & 3) * 2, key0 = half_of_keys() * WARP_KEYS;
    float l[2], mean[2] = {0.0f, 0.0f}, top[2] = {0.0f, 0.0f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + row0 + 8 * r + g;
        l[r] = row < n_q && steps > 0 ? lse[bh * n_q + row] * LOG2_E : 0.0f;
    }
    const float scale = softmax_scale * LOG2_E * q_scale[bh * t_m + row_block];
    if (steps > 0) {
        const long long rows_at = (bh * n_q + first_row) * HEAD_DIM;
        load_tile<ROWS, HALF_ROW, DQ_THREADS>(q_tile, q + rows_at, HALF_ROW, n_q - first_row);
        load_tile<ROWS, HALF_ROW, DQ_THREADS>(grad_tile, grad + rows_at, HALF_ROW, n_q - first_row);
    }
    float p[WARP_KEYS / 8][4];
    walk_blocks(
        k, v, list, steps, length, k_ring, v_ring,
        [&](const unsigned char* k_tile, int) {
            clear(p);
            product_over_channels<ROWS_UNROLL>(p, q_tile, row0, k_tile);
        },
        [&](const unsigned char*, const unsigned char* v_tile, int block) {
            float d_p[WARP_KEYS / 8][4];
            clear(d_p);
            product_over_channels<ROWS_UNROLL>(d_p, grad_tile, row0, v_tile);
            const int valid = length - block * BLOCK_K - key0;
            const float factor = scale * k_scale[block];
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (8 * n + column + (e & 1) >= valid) continue;  // a padding key
                    const float probability = exp2_approx(p[n][e] * factor - l[e >> 1]);
                    mean[e >> 1] += probability * d_p[n][e];
                    top[e >> 1] = fmaxf(top[e >> 1], probability);
                }
        });
#pragma unroll
    for (int r = 0; r < 2; ++r) mean[r] = quad_sum(mean[r]), top[r] = quad_max(top[r]);
    if (KEY_HALVES == 2) {  // of the second half of the keys
        float* other = reinterpret_cast<float*>(q_tile) + threadIdx.x % (DQ_THREADS / 2);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (key0 > 0) other[r * DQ_THREADS] = mean[r], other[(2 + r) * DQ_THREADS] = top[r];
        __syncthreads();
        if (key0 > 0) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            mean[r] += other[r * DQ_THREADS];
            top[r] = fmaxf(top[r], other[(2 + r) * DQ_THREADS]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + row0 + 8 * r + g;
        if (row >= n_q || (lane & 3) != 0) continue;
        row_mean[bh * n_q + row] = mean[r];
        row_top[bh * n_q + row] = top[r] == 0.0f ? 1.0f : top[r];
    }
}
