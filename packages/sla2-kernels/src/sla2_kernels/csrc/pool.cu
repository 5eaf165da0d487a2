// The first pass over Q and K, and in 8 bit over V: block means, K's mean over its tokens, the
// scales of Q and V. What routing and attention both begin with.
//
// The caller's Q, K and V may lie in any layout whose channels are adjacent: x_item, x_head and
// x_step are elements from a batch item, a head and a token to the next, multiples of 8. What is
// written is (B H, N, D), contiguous.
#include "block.cuh"

constexpr int POOL_THREADS = 2 * HEAD_DIM;
constexpr int POOL_GROUPS = POOL_THREADS / ROW_LANES;  // rows of a pass
constexpr int POOL_BLOCKS = 512 / POOL_THREADS;  // on a multiprocessor: 128 registers for a thread

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

// Means over the first `valid` rows of a block, whose other rows are zeros, to `means` or, where
// that is null, in 16 bit to `rounded`.
template <int ROWS>
SLA2_INLINE void store_means(const Block<ROWS, POOL_THREADS>& block, int valid,
                             float (&sums)[POOL_GROUPS][HEAD_DIM], float* means,
                             half_bits* rounded) {
    const int lane = threadIdx.x % ROW_LANES, group = threadIdx.x / ROW_LANES;
    float total[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) total[e] = 0.0f;
#pragma unroll
    for (int pass = 0; pass < block.PASSES; ++pass) {
        float x[8];
        unpack_chunk(x, block.kept[pass]);
#pragma unroll
        for (int e = 0; e < 8; ++e) total[e] += x[e];
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) sums[group][8 * lane + e] = total[e];
    __syncthreads();
    const float share = 1.0f / static_cast<float>(valid > 0 ? valid : 1);
    const int c = threadIdx.x;
    if (c >= HEAD_DIM) return;  // there are more threads than channels
    float sum = 0.0f;
    for (int g = 0; g < POOL_GROUPS; ++g) sum += sums[g][c];
    if (means != nullptr) means[c] = sum * share;
    else rounded[c] = float_to_half(sum * share);
}

// The largest |x| of each channel, NaN where there is one.
template <int ROWS>
SLA2_INLINE void store_tops(const Block<ROWS, POOL_THREADS>& block,
                            float (&tops)[POOL_GROUPS][HEAD_DIM], float* out) {
    const int lane = threadIdx.x % ROW_LANES, group = threadIdx.x / ROW_LANES;
    float top[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) top[e] = 0.0f;
#pragma unroll
    for (int pass = 0; pass < block.PASSES; ++pass) {
        float x[8];
        unpack_chunk(x, block.kept[pass]);
#pragma unroll
        for (int e = 0; e < 8; ++e) top[e] = max_nan(top[e], fabsf(x[e]));
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) tops[group][8 * lane + e] = top[e];
    __syncthreads();
    const int c = threadIdx.x;
    if (c >= HEAD_DIM) return;
    float most = 0.0f;
    for (int g = 0; g < POOL_GROUPS; ++g) most = max_nan(most, tops[g][c]);
    out[c] = most;
}

// Grid (key_blocks + value_blocks + query blocks, B H). The first key_blocks, T_n, make means of K
// over its valid tokens (B H, T_n, D), 0 where there is none; in 8 bit they read V too, for the
// largest |V| of each channel (B H, T_n, D) and its means in 16 bit (B H, T_n, D), or null. In 16
// bit the value_blocks, T_n or none, make those. k_tiles and v_tiles (B H, T_n, BLOCK_K x D): K and
// V as sm90/pack.cu lays them out, in 16 bit, or null. The others, T_m or none, make means of Q
// (B H, T_m, D), or null, and in 8 bit the scale of each block (B H, T_m).
extern "C" __global__ void __launch_bounds__(POOL_THREADS, POOL_BLOCKS)
sla2_pool(const half_bits* __restrict__ q, long long q_item, long long q_head, int q_step,
          const half_bits* __restrict__ k, long long k_item, long long k_head, int k_step,
          const half_bits* __restrict__ v, long long v_item, long long v_head, int v_step,
          const int* __restrict__ kv_lengths, float* __restrict__ pooled_q,
          float* __restrict__ pooled_k, half_bits* __restrict__ pooled_v,
          unsigned char* __restrict__ k_tiles, unsigned char* __restrict__ v_tiles,
          float* __restrict__ q_scale, float* __restrict__ value_top, int num_heads, int n_q,
          int n_k, int key_blocks, int value_blocks) {
    __shared__ float sums[POOL_GROUPS][HEAD_DIM];
    __shared__ float tops[POOL_GROUPS][HEAD_DIM];
    const long long bh = blockIdx.y;
    const int item = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    int block = blockIdx.x;
    if (block < key_blocks + value_blocks) {
        const bool values = !LOW_BIT && block >= key_blocks;
        if (values) block -= key_blocks;
        const int first = block * BLOCK_K, step = values ? v_step : k_step;
        const int valid = clamp_int(valid_keys(kv_lengths, item, n_k) - first, 0, BLOCK_K);
        const long long at = (bh * key_blocks + block) * HEAD_DIM;
        const half_bits* x = values ? v + item * v_item + head * v_head
                                    : k + item * k_item + head * k_head;
        Block<BLOCK_K, POOL_THREADS> tokens;
        tokens.load(x + static_cast<long long>(first) * step, step, n_k - first);
        if (LOW_BIT) {
            Block<BLOCK_K, POOL_THREADS> own;
            own.load(v + item * v_item + head * v_head + static_cast<long long>(first) * v_step,
                     v_step, n_k - first);
            own.cut(valid);
            store_tops(own, tops, value_top + at);
            if (pooled_v != nullptr) {
                store_means(own, valid, sums, nullptr, pooled_v + at);
                __syncthreads();  // `sums` serves the keys next
            }
        }
        tokens.cut(valid);
        if (!LOW_BIT && k_tiles != nullptr)
            tokens.store_tile((values ? v_tiles : k_tiles) + at * (BLOCK_K * 2));
        store_means(tokens, valid, sums, values ? nullptr : pooled_k + at, pooled_v + at);
        return;
    }
    block -= key_blocks + value_blocks;
    const int first = block * BLOCK_Q;
    const int rows = n_q - first < BLOCK_Q ? n_q - first : BLOCK_Q;
    const long long row_block = bh * (gridDim.x - key_blocks - value_blocks) + block;
    Block<BLOCK_Q, POOL_THREADS> queries;
    queries.load(q + item * q_item + head * q_head + static_cast<long long>(first) * q_step,
                 q_step, rows);
    queries.cut(rows);
    if (pooled_q != nullptr)
        store_means(queries, rows, sums, pooled_q + row_block * HEAD_DIM, nullptr);
    if (LOW_BIT) {
        const float scale = queries.scale(&tops[0][0]);
        if (threadIdx.x == 0) q_scale[row_block] = scale;
    }
}

// Over the key blocks of each head, in a fixed order: mean (B H, D) over the valid tokens, and
// value_scale (B H, D), the largest value_top / limit (null: not wanted). `x` (B H, T_n, D) holds
// sums over the valid tokens of each block, or with `means` their means, from which `shift` then
// takes the mean away; `rounded` takes them in 16 bit, 0 where there is no token (null: not
// wanted). k_tiles and v_tiles, or null, take the same and value_means (B H, T_n, D) as tiles of
// pooled keys that end with zeros. Grid (B H), 512 threads. Also ends the backward's mean of dK,
// whose sums are (B H, T_n + slices, D): more[bh (T_n + 1) + T_n] rows behind those of the blocks
// are of slices (columns.cuh; more may be null).
extern "C" __global__ void __launch_bounds__(512)
sla2_key_mean(float* x, const float* __restrict__ value_top, const int* __restrict__ kv_lengths,
              float* __restrict__ mean, float* __restrict__ value_scale,
              half_bits* __restrict__ rounded, const half_bits* __restrict__ value_means,
              unsigned char* __restrict__ k_tiles, unsigned char* __restrict__ v_tiles,
              const int* __restrict__ more, int num_heads, int n_k, int t_n, int slices, int means,
              int shift) {
    constexpr int GROUPS = 512 / HEAD_DIM;
    __shared__ float sums[GROUPS][HEAD_DIM];
    __shared__ float tops[GROUPS][HEAD_DIM];
    const int c = threadIdx.x % HEAD_DIM, group = threadIdx.x / HEAD_DIM;
    const long long bh = blockIdx.x;
    const int length = valid_keys(kv_lengths, blockIdx.x / num_heads, n_k);
    const int rows = t_n + (more == nullptr ? 0 : more[bh * (t_n + 1) + t_n]);
    float sum = 0.0f, top = 0.0f;
    for (int block = group; block < rows; block += GROUPS) {
        const long long at = (bh * (t_n + slices) + block) * HEAD_DIM + c;
        const int tokens = means ? clamp_int(length - block * BLOCK_K, 0, BLOCK_K) : 1;
        sum += x[at] * static_cast<float>(tokens);
        if (value_top != nullptr) top = max_nan(top, value_top[at]);
    }
    sums[group][c] = sum, tops[group][c] = top;
    __syncthreads();
    sum = 0.0f;
    for (int g = 0; g < GROUPS; ++g) sum += sums[g][c], top = max_nan(top, tops[g][c]);
    const float whole = sum / static_cast<float>(length);
    if (group == 0) {
        mean[bh * HEAD_DIM + c] = whole;
        if (value_top != nullptr) value_scale[bh * HEAD_DIM + c] = scale_of(top, PV_LIMIT);
    }
    if (k_tiles != nullptr)
        for (int block = group; block < ceil_div(t_n, BLOCK_K) * BLOCK_K; block += GROUPS) {
            const bool there = block < t_n;
            const long long at = (bh * t_n + block) * HEAD_DIM + c;
            const float left = there && block * BLOCK_K < length
                                   ? (shift ? x[at] - whole : x[at])
                                   : 0.0f;
            *pooled_place(k_tiles, bh, t_n, block, c) = float_to_half(left);
            *pooled_place(v_tiles, bh, t_n, block, c) =
                there ? value_means[at] : static_cast<half_bits>(0);
        }
    if (!shift && rounded == nullptr) return;
    for (int block = group; block < t_n; block += GROUPS) {
        const long long at = (bh * t_n + block) * HEAD_DIM + c;
        const float left = shift ? x[at] - whole : x[at];
        if (shift) x[at] = left;
        if (rounded != nullptr) rounded[at] = float_to_half(block * BLOCK_K < length ? left : 0.0f);
    }
}
