// What is done once per tensor before routing and attention: mean of K, smoothing, block means,
// phi, 8-bit copies.
//
// The caller's Q, K and V may lie in any layout whose channels are adjacent: x_item, x_head and
// x_step are elements from a batch item, a head and a token to the next, multiples of 8. What is
// written is (B H, N, D), contiguous.
#include "formats.cuh"

constexpr int ROW_LANES = HEAD_DIM / 8;  // lanes of a row, 8 channels (16 bytes) each
constexpr int RESIDENT_THREADS = 512;    // of a multiprocessor: leaves 128 registers for a thread

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
#pragma unroll 2  // ptxas spills on sm_90a (d = 64) if it unrolls more
    for (int token = block * BLOCK_K + group; token < end; token += GROUPS) {
        float x[8];
        unpack_chunk(x, load_16(k + static_cast<long long>(token) * k_step));
#pragma unroll
        for (int e = 0; e < 8; ++e) total[e] += x[e];
        if (value_max != nullptr) {
            unpack_chunk(x, load_16(v + static_cast<long long>(token) * v_step));
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
// copy with one scale. Null outputs are skipped. Tokens past `valid` but below `rows`, which is at
// least 1, come out as zeros. The 16-bit x - mean is what everything else is made from.
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
    // the largest value of all of it, and x is read from memory once. All loads are under way
    // before the first value is used; those of rows past the end read the last row.
    uint4 kept[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int row = pass * GROUPS + group;
        kept[pass] = load_16(x + (row < rows ? row : rows - 1) * x_step + 8 * lane);
    }
    float shift[8], total[8], top = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e)
        shift[e] = mean == nullptr ? 0.0f : mean[8 * lane + e], total[e] = 0.0f;
    const int inside = channels - 8 * lane;  // at least 8 but where heads are padded
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int row = pass * GROUPS + group;
        float y[8];
        if (mean != nullptr) {
            unpack_chunk(y, kept[pass]);
#pragma unroll
            for (int e = 0; e < 8; ++e) y[e] -= shift[e];
            kept[pass] = pack_chunk(y);
        }
        if (row >= valid) kept[pass].x = kept[pass].y = kept[pass].z = kept[pass].w = 0u;
        unpack_chunk(y, kept[pass]);
#pragma unroll
        for (int e = 0; e < 8; ++e) total[e] += y[e], top = max_nan(top, fabsf(y[e]));
        if (smooth != nullptr && row < rows)
            *reinterpret_cast<uint4*>(smooth + row * HEAD_DIM + 8 * lane) = kept[pass];
        if (phi == nullptr) continue;
        softmax_of_lanes(y, inside);
        uint4 chunk = pack_chunk(y);
        if (row >= valid) chunk.x = chunk.y = chunk.z = chunk.w = 0u;
        if (row < rows) *reinterpret_cast<uint4*>(phi + row * HEAD_DIM + 8 * lane) = chunk;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) sums[group][8 * lane + e] = total[e];
    top = warp_max_nan(top);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    if (pooled != nullptr) {
        const float share = 1.0f / static_cast<float>(valid > 0 ? valid : 1);
        for (int c = threadIdx.x; c < HEAD_DIM; c += THREADS) {
            float sum = 0.0f;
            for (int g = 0; g < GROUPS; ++g) sum += sums[g][c];
            pooled[c] = sum * share;
        }
    }
    if (bytes == nullptr) return;
    for (int w = 0; w < THREADS / 32; ++w) top = max_nan(top, tops[w]);
    const float step = scale_of(top, QK_LIMIT);
    if (threadIdx.x == 0) *scale = step;
    const Divisor by(step);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int row = pass * GROUPS + group;
        float y[8];
        unpack_chunk(y, kept[pass]);
#pragma unroll
        for (int e = 0; e < 8; ++e) y[e] = by.divide(y[e]);
        uint2 packed;
        packed.x = pack_bytes<QK_FP8>(y[0], y[1], y[2], y[3]);
        packed.y = pack_bytes<QK_FP8>(y[4], y[5], y[6], y[7]);
        if (row < rows) *reinterpret_cast<uint2*>(bytes + row * HEAD_DIM + 8 * lane) = packed;
    }
}

// Grid (T_n, B H). mean (B H, D) or null; smooth, phi (B H, n_k, D); pooled (B H, T_n, D); bytes
// (B H, n_k, D) and scale (B H, T_n), or null.
extern "C" __global__ void __launch_bounds__(2 * BLOCK_K, RESIDENT_THREADS / (2 * BLOCK_K))
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

// Grid (T_m, B H). pooled (B H, T_m, D); bytes (B H, n_q, D) and scale (B H, T_m), or null.
extern "C" __global__ void __launch_bounds__(2 * BLOCK_Q, RESIDENT_THREADS / (2 * BLOCK_Q))
sla2_prologue_q(const half_bits* __restrict__ q, long long q_item, long long q_head, int q_step,
                float* pooled, unsigned char* bytes, float* scale, int num_heads, int n_q) {
    const long long bh = blockIdx.y, block = bh * gridDim.x + blockIdx.x;
    const int first = blockIdx.x * BLOCK_Q, item = blockIdx.y / num_heads;
    const int head = blockIdx.y % num_heads;
    const long long at = (bh * n_q + first) * HEAD_DIM;
    prepare_block<BLOCK_Q, 2 * BLOCK_Q>(
        q + item * q_item + head * q_head + static_cast<long long>(first) * q_step, q_step,
        nullptr, HEAD_DIM, n_q - first, n_q - first < BLOCK_Q ? n_q - first : BLOCK_Q,
        nullptr, nullptr,
        pooled == nullptr ? nullptr : pooled + block * HEAD_DIM,
        bytes == nullptr ? nullptr : bytes + at, scale + block);
}

// V in 8 bit, transposed and permuted (formats.cuh): bytes (B H, T_n, D, BLOCK_K), with 0 for
// padding tokens. Grid (T_n, B H), 128 threads; value_scale (B H, D).
extern "C" __global__ void __launch_bounds__(128)
sla2_prologue_v(const half_bits* __restrict__ v, long long v_item, long long v_head, int v_step,
                const float* __restrict__ value_scale, const int* __restrict__ kv_lengths,
                unsigned char* __restrict__ bytes, int num_heads, int n_k) {
    constexpr int PASSES = BLOCK_K * ROW_LANES / 128;  // of 16 bytes a thread
    constexpr int SHARES = 128 / HEAD_DIM, GROUPS = BLOCK_K / 16 / SHARES;
    // [token][pair of channels]; + 1: rows begin in different banks.
    __shared__ unsigned tile[BLOCK_K][HEAD_DIM / 2 + 1];
    const long long bh = blockIdx.y;
    const int first = blockIdx.x * BLOCK_K, rows = n_k - first;
    const int item = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const int valid = valid_keys(kv_lengths, item, n_k) - first;
    v += item * v_item + head * v_head + static_cast<long long>(first) * v_step;
    uint4 kept[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int i = pass * 128 + threadIdx.x, row = i / ROW_LANES;
        kept[pass] = load_16(v + (row < rows ? row : rows - 1) * v_step + 8 * (i % ROW_LANES));
    }
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int i = pass * 128 + threadIdx.x, row = i / ROW_LANES;
        unsigned* pairs = &tile[row][4 * (i % ROW_LANES)];
        const bool inside = row < valid;
        pairs[0] = inside ? kept[pass].x : 0u, pairs[1] = inside ? kept[pass].y : 0u;
        pairs[2] = inside ? kept[pass].z : 0u, pairs[3] = inside ? kept[pass].w : 0u;
    }
    __syncthreads();
    // A thread makes one channel's bytes, 16 keys at a time; of 64 channels it shares each with
    // another thread. (In low bit a block holds 32 or 64 keys, so shares are whole.)
    const int c = threadIdx.x % HEAD_DIM, share = threadIdx.x / HEAD_DIM;
    const Divisor by(value_scale[bh * HEAD_DIM + c]);
    unsigned char* target =
        bytes + ((bh * gridDim.x + blockIdx.x) * HEAD_DIM + c) * BLOCK_K + share * GROUPS * 16;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        unsigned words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            float x[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int key = (share * GROUPS + group) * 16 + permuted_key(4 * w + e);
                const unsigned pair = tile[key][c / 2];
                x[e] = by.divide(c % 2 ? high_half(pair) : low_half(pair));
            }
            words[w] = pack_bytes<PV_FP8>(x[0], x[1], x[2], x[3]);
        }
        uint4 packed;
        packed.x = words[0], packed.y = words[1], packed.z = words[2], packed.w = words[3];
        *reinterpret_cast<uint4*>(target + 16 * group) = packed;
    }
}
