// What is done once per tensor before routing and attention: mean of K, smoothing, block means,
// phi, 8-bit copies.
//
// The caller's Q, K and V may lie in any layout whose channels are adjacent: x_item, x_head and
// x_step are elements from a batch item, a head and a token to the next, multiples of 8. What is
// written is (B H, N, D), contiguous.
#include "formats.cuh"

constexpr int ROW_LANES = HEAD_DIM / 8;  // lanes of a row, 8 channels (16 bytes) each

SLA2_INLINE void unpack_chunk(float (&x)[8], const uint4& raw) {
    x[0] = low_half(raw.x), x[1] = high_half(raw.x);
    x[2] = low_half(raw.y), x[3] = high_half(raw.y);
    x[4] = low_half(raw.z), x[5] = high_half(raw.z);
    x[6] = low_half(raw.w), x[7] = high_half(raw.w);
}

SLA2_INLINE uint4 pack_chunk(const float (&x)[8]) {
    uint4 raw;
    raw.x = pack_half(x[0], x[1]), raw.y = pack_half(x[2], x[3]);
    raw.z = pack_half(x[4], x[5]), raw.w = pack_half(x[6], x[7]);
    return raw;
}

// Copies source_columns 16-bit values of every token into rows of target_columns,
// (B H, tokens, target_columns); columns without a source are 0. Strides may be any. Grid
// (any, B H).
extern "C" __global__ void __launch_bounds__(256)
sla2_copy_columns(const half_bits* __restrict__ source, long long source_item,
                  long long source_head, int source_step, half_bits* __restrict__ target,
                  int num_heads, int tokens, int source_columns, int target_columns) {
    const long long count = static_cast<long long>(tokens) * target_columns;
    source += blockIdx.y / num_heads * source_item + blockIdx.y % num_heads * source_head;
    target += blockIdx.y * count;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
        const long long token = i / target_columns;
        const int column = static_cast<int>(i % target_columns);
        target[i] = column < source_columns ? source[token * source_step + column]
                                            : static_cast<half_bits>(0);
    }
}

// Per key block: the sum of K over its valid tokens and the largest |V| per channel
// (v and value_max may be null). Grid (T_n, B H), 128 threads: groups of ROW_LANES threads take a
// token each.
extern "C" __global__ void __launch_bounds__(128)
sla2_key_sums(const half_bits* __restrict__ k, long long k_item, long long k_head, int k_step,
              const half_bits* __restrict__ v, long long v_item, long long v_head, int v_step,
              const int* __restrict__ kv_lengths, float* __restrict__ key_sum,
              float* __restrict__ value_max, int num_heads, int n_k) {
    constexpr int GROUPS = 128 / ROW_LANES;
    __shared__ float sums[GROUPS][HEAD_DIM];
    __shared__ float tops[GROUPS][HEAD_DIM];
    const int block = blockIdx.x, lane = threadIdx.x % ROW_LANES, group = threadIdx.x / ROW_LANES;
    const long long bh = blockIdx.y;
    const int item = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const int length = valid_keys(kv_lengths, item, n_k);
    const int end = length < (block + 1) * BLOCK_K ? length : (block + 1) * BLOCK_K;
    k += item * k_item + head * k_head + 8 * lane, v += item * v_item + head * v_head + 8 * lane;
    float total[8], top[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) total[e] = 0.0f, top[e] = 0.0f;
    for (int token = block * BLOCK_K + group; token < end; token += GROUPS) {
        float x[8];
        unpack_chunk(
            x, *reinterpret_cast<const uint4*>(k + static_cast<long long>(token) * k_step));
#pragma unroll
        for (int e = 0; e < 8; ++e) total[e] += x[e];
        if (value_max != nullptr) {
            unpack_chunk(
                x, *reinterpret_cast<const uint4*>(v + static_cast<long long>(token) * v_step));
#pragma unroll
            for (int e = 0; e < 8; ++e) top[e] = max_nan(top[e], fabsf(x[e]));
        }
    }
#pragma unroll
    for (int e = 0; e < 8; ++e)
        sums[group][8 * lane + e] = total[e], tops[group][8 * lane + e] = top[e];
    __syncthreads();
    for (int c = threadIdx.x; c < HEAD_DIM; c += 128) {
        float sum = 0.0f, most = 0.0f;
        for (int g = 0; g < GROUPS; ++g) sum += sums[g][c], most = max_nan(most, tops[g][c]);
        const long long at = (bh * gridDim.x + block) * HEAD_DIM + c;
        key_sum[at] = sum;
        if (value_max != nullptr) value_max[at] = most;
    }
}

// Over the key blocks: mean[bh, c] = sum / valid tokens, value_scale[bh, c] = max / limit
// (null: not wanted), in a fixed order. Grid (B H), 512 threads. Also ends the backward's mean of
// dK.
extern "C" __global__ void __launch_bounds__(512)
sla2_key_mean(const float* __restrict__ key_sum, const float* __restrict__ value_max,
              const int* __restrict__ kv_lengths, float* __restrict__ mean,
              float* __restrict__ value_scale, int num_heads, int n_k, int t_n) {
    constexpr int GROUPS = 512 / HEAD_DIM;
    __shared__ float sums[GROUPS][HEAD_DIM];
    __shared__ float tops[GROUPS][HEAD_DIM];
    const int c = threadIdx.x % HEAD_DIM, group = threadIdx.x / HEAD_DIM;
    const long long bh = blockIdx.x;
    float sum = 0.0f, top = 0.0f;
    for (int block = group; block < t_n; block += GROUPS) {
        sum += key_sum[(bh * t_n + block) * HEAD_DIM + c];
        if (value_max != nullptr) top = max_nan(top, value_max[(bh * t_n + block) * HEAD_DIM + c]);
    }
    sums[group][c] = sum, tops[group][c] = top;
    __syncthreads();
    if (group == 0) {
        for (int g = 1; g < GROUPS; ++g) sum += sums[g][c], top = max_nan(top, tops[g][c]);
        mean[bh * HEAD_DIM + c] =
            sum / static_cast<float>(valid_keys(kv_lengths, blockIdx.x / num_heads, n_k));
        if (value_max != nullptr) value_scale[bh * HEAD_DIM + c] = scale_of(top, PV_LIMIT);
    }
}

// One block of ROWS tokens, x_step elements apart: x - mean rounded to 16 bit (smooth), its softmax
// over the first `channels` channels (phi), its mean over the valid tokens (pooled), and an 8-bit
// copy with one scale. Null outputs are skipped. Tokens past `valid` but below `rows` come out as
// zeros. The 16-bit x - mean is what everything else is made from.
template <int ROWS, int THREADS>
SLA2_INLINE void prepare_block(const half_bits* x, int x_step, const float* mean, int channels,
                               int rows, int valid, half_bits* smooth, half_bits* phi,
                               float* pooled, unsigned char* bytes, float* scale) {
    constexpr int GROUPS = THREADS / ROW_LANES, PASSES = ROWS / GROUPS;
    static_assert(ROWS % GROUPS == 0, "every pass is whole");
    __shared__ float sums[GROUPS][HEAD_DIM];
    __shared__ float tops[THREADS / 32];
    const int lane = threadIdx.x % ROW_LANES, group = threadIdx.x / ROW_LANES;
    // The block stays in registers, 8 channels a lane in each pass: the 8-bit copy at the end needs
    // the largest value of all of it, and x is read from memory once.
    uint4 kept[PASSES];
    float shift[8], total[8], top = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e)
        shift[e] = mean == nullptr ? 0.0f : mean[8 * lane + e], total[e] = 0.0f;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int row = pass * GROUPS + group;
        float y[8], p[8];
        kept[pass].x = kept[pass].y = kept[pass].z = kept[pass].w = 0u;
        if (row < valid) {
            kept[pass] = *reinterpret_cast<const uint4*>(x + row * x_step + 8 * lane);
            if (mean != nullptr) {
                unpack_chunk(y, kept[pass]);
#pragma unroll
                for (int e = 0; e < 8; ++e) y[e] -= shift[e];
                kept[pass] = pack_chunk(y);
            }
        }
        unpack_chunk(y, kept[pass]);
        // phi: the softmax over a row, which ROW_LANES neighbouring lanes share.
        float largest = MINUS_INFINITY, below = 0.0f;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            total[e] += y[e];
            top = max_nan(top, fabsf(y[e]));
            if (8 * lane + e < channels) largest = fmaxf(largest, y[e]);
        }
        for (int mask = 1; mask < ROW_LANES; mask <<= 1)
            largest = fmaxf(largest, shfl_xor(largest, mask));
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            p[e] = 8 * lane + e < channels ? exp2_approx((y[e] - largest) * LOG2_E) : 0.0f;
            below += p[e];
        }
        for (int mask = 1; mask < ROW_LANES; mask <<= 1) below += shfl_xor(below, mask);
        if (row < rows) {
            const float inverse = row < valid ? 1.0f / below : 0.0f;
#pragma unroll
            for (int e = 0; e < 8; ++e) p[e] *= inverse;
            if (smooth != nullptr)
                *reinterpret_cast<uint4*>(smooth + row * HEAD_DIM + 8 * lane) = kept[pass];
            if (phi != nullptr)
                *reinterpret_cast<uint4*>(phi + row * HEAD_DIM + 8 * lane) = pack_chunk(p);
        }
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) sums[group][8 * lane + e] = total[e];
    top = warp_max_nan(top);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    if (pooled != nullptr) {
        const float count = static_cast<float>(valid > 0 ? valid : 1);
        for (int c = threadIdx.x; c < HEAD_DIM; c += THREADS) {
            float sum = 0.0f;
            for (int g = 0; g < GROUPS; ++g) sum += sums[g][c];
            pooled[c] = sum / count;
        }
    }
    if (bytes == nullptr) return;
    for (int w = 0; w < THREADS / 32; ++w) top = max_nan(top, tops[w]);
    const float step = scale_of(top, QK_LIMIT);
    if (threadIdx.x == 0) *scale = step;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int row = pass * GROUPS + group;
        float y[8];
        unpack_chunk(y, kept[pass]);
        uint2 packed;
        packed.x = pack_bytes<QK_FP8>(y[0] / step, y[1] / step, y[2] / step, y[3] / step);
        packed.y = pack_bytes<QK_FP8>(y[4] / step, y[5] / step, y[6] / step, y[7] / step);
        if (row < rows) *reinterpret_cast<uint2*>(bytes + row * HEAD_DIM + 8 * lane) = packed;
    }
}

// Grid (T_n, B H). mean (B H, D) or null; smooth, phi (B H, n_k, D); pooled (B H, T_n, D); bytes
// (B H, n_k, D) and scale (B H, T_n), or null.
extern "C" __global__ void __launch_bounds__(2 * BLOCK_K, 1)
sla2_prologue_k(const half_bits* __restrict__ k, long long k_item, long long k_head, int k_step,
                const float* __restrict__ mean, const int* __restrict__ kv_lengths,
                half_bits* smooth, half_bits* phi, float* pooled, unsigned char* bytes,
                float* scale, int num_heads, int n_k, int channels) {
    const long long bh = blockIdx.y, block = bh * gridDim.x + blockIdx.x;
    const int first = blockIdx.x * BLOCK_K, item = blockIdx.y / num_heads;
    const int head = blockIdx.y % num_heads;
    const long long at = (bh * n_k + first) * HEAD_DIM;
    prepare_block<BLOCK_K, 2 * BLOCK_K>(
        k + item * k_item + head * k_head + static_cast<long long>(first) * k_step, k_step,
        mean == nullptr ? nullptr : mean + bh * HEAD_DIM, channels, n_k - first,
        clamp_int(valid_keys(kv_lengths, item, n_k) - first, 0, BLOCK_K),
        smooth == nullptr ? nullptr : smooth + at, phi == nullptr ? nullptr : phi + at,
        pooled == nullptr ? nullptr : pooled + block * HEAD_DIM,
        bytes == nullptr ? nullptr : bytes + at, scale + block);
}

// Grid (T_m, B H). phi (B H, n_q, D); pooled (B H, T_m, D); bytes (B H, n_q, D) and scale
// (B H, T_m), or null.
extern "C" __global__ void __launch_bounds__(2 * BLOCK_Q, 1)
sla2_prologue_q(const half_bits* __restrict__ q, long long q_item, long long q_head, int q_step,
                half_bits* phi, float* pooled, unsigned char* bytes, float* scale,
                int num_heads, int n_q, int channels) {
    const long long bh = blockIdx.y, block = bh * gridDim.x + blockIdx.x;
    const int first = blockIdx.x * BLOCK_Q, item = blockIdx.y / num_heads;
    const int head = blockIdx.y % num_heads;
    const long long at = (bh * n_q + first) * HEAD_DIM;
    prepare_block<BLOCK_Q, 2 * BLOCK_Q>(
        q + item * q_item + head * q_head + static_cast<long long>(first) * q_step, q_step,
        nullptr, channels, n_q - first, n_q - first < BLOCK_Q ? n_q - first : BLOCK_Q,
        nullptr, phi == nullptr ? nullptr : phi + at,
        pooled == nullptr ? nullptr : pooled + block * HEAD_DIM,
        bytes == nullptr ? nullptr : bytes + at, scale + block);
}

// V in 8 bit, transposed and permuted (formats.cuh): bytes (B H, T_n, D, BLOCK_K), with 0 for
// padding tokens. Grid (T_n, B H), 128 threads; value_scale (B H, D).
extern "C" __global__ void __launch_bounds__(128)
sla2_prologue_v(const half_bits* __restrict__ v, long long v_item, long long v_head, int v_step,
                const float* __restrict__ value_scale, const int* __restrict__ kv_lengths,
                unsigned char* __restrict__ bytes, int num_heads, int n_k) {
    __shared__ half_bits tile[BLOCK_K][HEAD_DIM + 2];  // + 2: columns fall into different banks
    const long long bh = blockIdx.y;
    const int first = blockIdx.x * BLOCK_K;
    const int item = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const int valid = valid_keys(kv_lengths, item, n_k) - first;
    v += item * v_item + head * v_head + static_cast<long long>(first) * v_step;
    for (int i = threadIdx.x; i < BLOCK_K * HEAD_DIM; i += 128) {
        const int row = i / HEAD_DIM, c = i % HEAD_DIM;
        tile[row][c] = row < valid ? v[row * v_step + c] : static_cast<half_bits>(0);
    }
    __syncthreads();
    unsigned* target =
        reinterpret_cast<unsigned*>(bytes + (bh * gridDim.x + blockIdx.x) * HEAD_DIM * BLOCK_K);
    for (int i = threadIdx.x; i < HEAD_DIM * BLOCK_K / 4; i += 128) {
        // Four bytes of channel c, from place p of the block; `base` is p's group of 16 keys.
        const int c = i / (BLOCK_K / 4), p = i % (BLOCK_K / 4) * 4, base = p & ~15;
        const float step = value_scale[bh * HEAD_DIM + c];
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
            x[e] = half_to_float(tile[base + permuted_key((p & 15) + e)][c]) / step;
        target[i] = pack_bytes<PV_FP8>(x[0], x[1], x[2], x[3]);
    }
}
