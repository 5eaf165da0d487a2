// Backward of the pooled complement, whose keys, the means of the blocks that a row does not
// select, are in the softmax of the selected ones: with the L and D = dO . O of that softmax, dQ
// and the gradient of b by rows, then the gradients of the means, in parts, and their sum.
// Formulas: README.md, "Pooled complement". A tile is BLOCK_K pooled keys.
#include "sparse_bwd.cuh"

static_assert(!MATCHED, "the pooled part is in 16 bit");
constexpr int ROW_UNROLL = SLA2_ARCH == 100 ? 2 : HEAD_DIM / 16;  // as DQ_UNROLL in sparse_bwd.cu
// As DKV_UNROLL there: more, and ptxas spills.
constexpr int KEY_UNROLL = HALVES ? HEAD_DIM / 16 : 2;

// The tiles of pooled keys in their order, as a list of blocks.
struct InOrder {
    __device__ __forceinline__ int operator[](int i) const { return i; }
};

// What is added to a pooled key's score, to base 2, beside b: -inf for a block without a token.
SLA2_INLINE float log2_tokens(int tokens) {
    return tokens > 0 ? log2f(static_cast<float>(tokens)) : MINUS_INFINITY;
}

// b of a row block, to base 2.
SLA2_INLINE float bias_of(const float* bias, int item, int head, int row_block, int stride_b,
                          int stride_h, int stride_row) {
    return LOG2_E * bias[static_cast<long long>(item) * stride_b + head * stride_h +
                         row_block * stride_row];
}

// d_q (B H, n_q, D) fp32 = sum over the pooled keys of dS kbar / sqrt(d); d_bias (B H, T_m) = the
// sum of dS over the block's rows and pooled keys. means_k, means_v (B H, T_n, D); bits
// (B H, T_m, ceil(T_n / 32)), where a set bit masks a pooled key; row_dot (B H, n_q) = dO . O. Grid
// (T_m, B H), a tile of ROWS query rows after the other. Shared memory as sparse_bwd_q.
extern "C" __global__ void __launch_bounds__(DQ_THREADS, 1)
sla2_pooled_bwd_q(const half_bits* __restrict__ q, const half_bits* __restrict__ means_k,
                  const half_bits* __restrict__ means_v, const half_bits* __restrict__ grad,
                  const float* __restrict__ lse, const float* __restrict__ row_dot,
                  const unsigned* __restrict__ bits, const int* __restrict__ kv_lengths,
                  const float* __restrict__ bias, int bias_stride_b, int bias_stride_h,
                  int bias_stride_row, float* __restrict__ d_q, float* __restrict__ d_bias,
                  int num_heads, int n_q, int n_k, float softmax_scale) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* q_tile = shared;
    unsigned char* grad_tile = q_tile + ROW_BYTES_ALL;
    unsigned char* k_ring = grad_tile + ROW_BYTES_ALL;
    unsigned char* v_ring = k_ring + 2 * KEY_BYTES;
    float* sums = reinterpret_cast<float*>(shared);  // of the warps, at the end

    const long long bh = blockIdx.y, block = bh * gridDim.x + blockIdx.x;
    const int t_n = ceil_div(n_k, BLOCK_K), words = ceil_div(t_n, 32);
    const int length = valid_keys(kv_lengths, blockIdx.y / num_heads, n_k);
    const int last = ceil_div(length, BLOCK_K) - 1;  // the last block that has a token
    means_k += bh * t_n * HEAD_DIM, means_v += bh * t_n * HEAD_DIM, bits += block * words;

    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, row0 = first_row_of_warp();
    const int g = lane >> 2, column = (lane & 3) * 2, key0 = half_of_keys() * WARP_KEYS;
    const float scale = softmax_scale * LOG2_E;
    // Of whole blocks; what the last one has less goes to its score.
    const float whole = log2_tokens(BLOCK_K);
    const float shift = whole + bias_of(bias, blockIdx.y / num_heads, blockIdx.y % num_heads,
                                        blockIdx.x, bias_stride_b, bias_stride_h, bias_stride_row);
    const float less = (log2_tokens(length - last * BLOCK_K) - whole) / scale;
    float below = 0.0f;  // the lane's part of d_bias
    for (int part = 0; part < PARTS; ++part) {
        const int first_row = (blockIdx.x * PARTS + part) * ROWS;
        if (first_row >= n_q) break;
        const long long line = bh * n_q + first_row;
        float l[2], mean[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row0 + 8 * r + g;
            const bool inside = first_row + row < n_q;
            l[r] = inside ? shift - lse[line + row] * LOG2_E : MINUS_INFINITY;
            mean[r] = inside ? row_dot[line + row] : 0.0f;
        }
        float acc[D_TILES][4], p[WARP_KEYS / 8][4];
        clear(acc);
        __syncthreads();  // nobody reads the part before
        load_tile<ROWS, HALF_ROW, DQ_THREADS>(q_tile, q + line * HEAD_DIM, HALF_ROW,
                                              n_q - first_row);
        load_tile<ROWS, HALF_ROW, DQ_THREADS>(grad_tile, grad + line * HEAD_DIM, HALF_ROW,
                                              n_q - first_row);
        walk_blocks(
            means_k, means_v, InOrder(), last / BLOCK_K + 1, t_n, k_ring, v_ring,
            [&](const unsigned char* k_tile, int tile) {
                clear(p);
                product_over_channels<ROW_UNROLL>(p, q_tile, row0, k_tile);
                const int end = last - tile * BLOCK_K - key0;  // of the keys with tokens
                if (end >= WARP_KEYS) return;
#pragma unroll
                for (int n = 0; n < WARP_KEYS / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int key = 8 * n + column + (e & 1);
                        if (key == end) p[n][e] += less;
                        if (key > end) p[n][e] = MINUS_INFINITY;
                    }
            },
            [&](const unsigned char* k_tile, const unsigned char* v_tile, int tile) {
                float d_p[WARP_KEYS / 8][4];
                clear(d_p);
                product_over_channels<ROW_UNROLL>(d_p, grad_tile, row0, v_tile);
#pragma unroll
                for (int n = 0; n < WARP_KEYS / 8; ++n) {
                    const int key = tile * BLOCK_K + key0 + 8 * n;
                    const int word = key / 32 < words ? key / 32 : words - 1;
                    const unsigned masked = bits[word] >> (bit_of(key & 31) + (lane & 3));
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const float exponent = p[n][e] * scale + l[e >> 1];
                        const float probability =
                            exp2_approx(masked >> 16 * (e & 1) & 1 ? MINUS_INFINITY : exponent);
                        const float d_score = probability * (d_p[n][e] - mean[e >> 1]);
                        below += d_score;
                        p[n][e] = d_score * softmax_scale;
                    }
                }
                product_over_rows(acc, p, k_tile);
            });
        if (KEY_HALVES == 2) join<DQ_THREADS>(acc, reinterpret_cast<float*>(k_ring));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row0 + 8 * r + g;
            if (first_row + row >= n_q || key0 > 0) continue;
#pragma unroll
            for (int n = 0; n < D_TILES; ++n) {
                float2 x;
                x.x = acc[n][2 * r], x.y = acc[n][2 * r + 1];
                *reinterpret_cast<float2*>(d_q + (line + row) * HEAD_DIM + 8 * n + column) = x;
            }
        }
    }
    __syncthreads();  // `sums` takes the place of Q
    below = warp_sum(below);
    if (lane == 0) sums[warp] = below;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float sum = 0.0f;
    for (int w = 0; w < DQ_THREADS / 32; ++w) sum += sums[w];
    d_bias[block] = sum;
}

// Gradients of the means of K and of V, fp32 (B H, parts, T_n, D): sums over a part of the query
// blocks, `blocks` of them, of dS^T Q / sqrt(d) and of P^T dO. Inputs as pooled_bwd_q. Grid
// (ceil(T_n / BLOCK_K), parts, B H). Shared memory as sparse_bwd_kv.
extern "C" __global__ void __launch_bounds__(DKV_THREADS, 1)
sla2_pooled_bwd_kv(const half_bits* __restrict__ q, const half_bits* __restrict__ means_k,
                   const half_bits* __restrict__ means_v, const half_bits* __restrict__ grad,
                   const float* __restrict__ lse, const float* __restrict__ row_dot,
                   const unsigned* __restrict__ bits, const int* __restrict__ kv_lengths,
                   const float* __restrict__ bias, int bias_stride_b, int bias_stride_h,
                   int bias_stride_row, float* __restrict__ d_k, float* __restrict__ d_v,
                   int num_heads, int n_q, int n_k, int blocks, float softmax_scale) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* k_tile = shared;
    unsigned char* v_tile = k_tile + KEY_BYTES;
    unsigned char* q_ring = v_tile + KEY_BYTES;
    unsigned char* grad_ring = q_ring + 2 * ROW_BYTES_ALL;
    // [slot][L - b, row_dot][ROWS], and what is added to the keys' scores beside: [slot][BLOCK_K]
    float* row_values = reinterpret_cast<float*>(grad_ring + 2 * ROW_BYTES_ALL);
    float* key_values = row_values + 4 * ROWS;

    const long long bh = blockIdx.z;
    const int item = blockIdx.z / num_heads, head = blockIdx.z % num_heads;
    const int t_m = ceil_div(n_q, BLOCK_Q), t_n = ceil_div(n_k, BLOCK_K), words = ceil_div(t_n, 32);
    const int length = valid_keys(kv_lengths, item, n_k), first_key = blockIdx.x * BLOCK_K;
    const int first_block = blockIdx.y * blocks, rest = t_m - first_block;
    // Without a token in the tile there is nothing to sum.
    const int steps = first_key * BLOCK_K < length ? (rest < blocks ? rest : blocks) * PARTS : 0;
    const int inside_keys = t_n - first_key;

    // Of the key that a thread of the first half looks after.
    const int own_key = first_key + threadIdx.x % BLOCK_K;
    bits += (bh * t_m + first_block) * words + (own_key < t_n ? own_key / 32 : 0);
    // Step t takes part t % PARTS of query block first_block + t / PARTS.
    auto load_rows = [&](int step) {
        const int slot = step & 1, first = first_block * BLOCK_Q + step * ROWS;
        const int inside = first < n_q ? n_q - first : 0;
        const long long line = inside > 0 ? bh * n_q + first : 0;
        load_tile<ROWS, HALF_ROW, DKV_THREADS>(q_ring + slot * ROW_BYTES_ALL, q + line * HEAD_DIM,
                                               HALF_ROW, inside);
        load_tile<ROWS, HALF_ROW, DKV_THREADS>(grad_ring + slot * ROW_BYTES_ALL,
                                               grad + line * HEAD_DIM, HALF_ROW, inside);
        const float b = bias_of(bias, item, head, first_block + step / PARTS, bias_stride_b,
                                bias_stride_h, bias_stride_row);
        for (int i = threadIdx.x; i < ROWS; i += DKV_THREADS) {
            float* values = row_values + 2 * slot * ROWS + i;
            values[0] = i < inside ? lse[line + i] * LOG2_E - b : -MINUS_INFINITY;
            values[ROWS] = i < inside ? row_dot[line + i] : 0.0f;
        }
        if (threadIdx.x < BLOCK_K)
            key_values[slot * BLOCK_K + threadIdx.x] =
                bits[step / PARTS * words] >> bit_of(own_key & 31) & 1
                    ? MINUS_INFINITY
                    : log2_tokens(clamp_int(length - own_key * BLOCK_K, 0, BLOCK_K));
    };

    const int lane = threadIdx.x & 31, row0 = first_key_of_warp(), g = lane >> 2;
    const int column = (lane & 3) * 2, key = first_key + row0 + g;
    const float* own_values = row_values + half_of_rows() * WARP_ROWS + column;
    float acc_k[D_TILES][4], acc_v[D_TILES][4];
    clear(acc_k);
    clear(acc_v);
    const float scale = softmax_scale * LOG2_E;
    if (steps > 0) {
        const long long key_at = (bh * t_n + first_key) * HEAD_DIM;
        load_tile<BLOCK_K, HALF_ROW, DKV_THREADS>(k_tile, means_k + key_at, HALF_ROW, inside_keys);
        load_tile<BLOCK_K, HALF_ROW, DKV_THREADS>(v_tile, means_v + key_at, HALF_ROW, inside_keys);
    }
    walk_rows<KEY_UNROLL>(
        acc_k, acc_v, k_tile, v_tile, q_ring, grad_ring, steps, load_rows,
        [&](float (&p)[WARP_ROWS / 8][4], int step) {
            const float* l = own_values + 2 * (step & 1) * ROWS;
            const float* sizes = key_values + (step & 1) * BLOCK_K + row0 + g;
            const float shift[2] = {sizes[0], sizes[8]};
#pragma unroll
            for (int n = 0; n < WARP_ROWS / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    p[n][e] = exp2_approx(p[n][e] * scale + (shift[e >> 1] - l[8 * n + (e & 1)]));
        },
        [&](float (&p)[WARP_ROWS / 8][4], float (&d_p)[WARP_ROWS / 8][4], int step) {
            const float* mean = own_values + (2 * (step & 1) + 1) * ROWS;
#pragma unroll
            for (int n = 0; n < WARP_ROWS / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    d_p[n][e] = p[n][e] * (d_p[n][e] - mean[8 * n + (e & 1)]) * softmax_scale;
        });
    if (ROW_HALVES == 2) {
        join<DKV_THREADS>(acc_v, reinterpret_cast<float*>(q_ring));
        join<DKV_THREADS>(acc_k, reinterpret_cast<float*>(k_tile));
        if (half_of_rows() > 0) return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (key + 8 * r >= t_n) continue;
        const long long at =
            ((bh * gridDim.y + blockIdx.y) * t_n + key + 8 * r) * HEAD_DIM + column;
#pragma unroll
        for (int n = 0; n < D_TILES; ++n) {
            float2 x, y;
            x.x = acc_k[n][2 * r], x.y = acc_k[n][2 * r + 1];
            y.x = acc_v[n][2 * r], y.y = acc_v[n][2 * r + 1];
            *reinterpret_cast<float2*>(d_k + at + 8 * n) = x;
            *reinterpret_cast<float2*>(d_v + at + 8 * n) = y;
        }
    }
}

// What each token of a block gets of the gradients of its means, fp32 (B H, T_n, D): the sum of the
// parts, in their order, over the number of its tokens; 0 without one. Grid (T_n, B H); 2 D
// threads, for K and for V.
extern "C" __global__ void __launch_bounds__(2 * HEAD_DIM)
sla2_pooled_bwd_sum(const float* __restrict__ parts_k, const float* __restrict__ parts_v,
                    const int* __restrict__ kv_lengths, float* __restrict__ share_k,
                    float* __restrict__ share_v, int num_heads, int n_k, int parts) {
    const int c = threadIdx.x % HEAD_DIM, t_n = gridDim.x;
    const long long bh = blockIdx.y;
    const int length = valid_keys(kv_lengths, blockIdx.y / num_heads, n_k);
    const int tokens = clamp_int(length - static_cast<int>(blockIdx.x) * BLOCK_K, 0, BLOCK_K);
    const float* from = threadIdx.x < HEAD_DIM ? parts_k : parts_v;
    from += (bh * parts * t_n + blockIdx.x) * HEAD_DIM + c;
    float sum = 0.0f;
    for (int part = 0; part < parts; ++part)
        sum += from[static_cast<long long>(part) * t_n * HEAD_DIM];
    float* to = threadIdx.x < HEAD_DIM ? share_k : share_v;
    to[(bh * t_n + blockIdx.x) * HEAD_DIM + c] = tokens > 0 ? sum / tokens : 0.0f;
}
