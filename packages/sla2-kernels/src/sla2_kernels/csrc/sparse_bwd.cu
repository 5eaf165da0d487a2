// Backward of the block-sparse branch in 16 bit: row sums, dQ by rows, dK and dV by the transposed
// map. No atomics.
#include "columns.cuh"
#include "sparse_bwd.cuh"

// Floats of a query row in shared memory.
constexpr int ROW_VALUES = MATCHED ? 4 : 2;
// What keeps ptxas from spilling: it holds fewer operands at once.
constexpr int DQ_UNROLL = SLA2_ARCH == 100 ? 2 : HEAD_DIM / 16;
constexpr int DKV_UNROLL = HALVES ? HEAD_DIM / 16 : (MATCHED ? 1 : 4);

// row_dot (B H, n_q) = dO . O_s, fp32: D of the softmax backward is this times the weight of O_s.
// Grid (T_m, B H).
extern "C" __global__ void __launch_bounds__(2 * BLOCK_Q)
sla2_bwd_row_dot(const half_bits* __restrict__ grad, const half_bits* __restrict__ out_sparse,
                 float* __restrict__ row_dot, int n_q) {
    constexpr int ROW_LANES = HEAD_DIM / 8, GROUPS = 2 * BLOCK_Q / ROW_LANES;
    const int lane = threadIdx.x % ROW_LANES;
    for (int i = threadIdx.x / ROW_LANES; i < BLOCK_Q; i += GROUPS) {
        const int row = blockIdx.x * BLOCK_Q + i;
        const long long line = static_cast<long long>(blockIdx.y) * n_q + row;
        float x = 0.0f;
        if (row < n_q) {
            float d[8], s[8];
            unpack_chunk(d, load_16(grad + line * HEAD_DIM + 8 * lane));
            unpack_chunk(s, load_16(out_sparse + line * HEAD_DIM + 8 * lane));
#pragma unroll
            for (int e = 0; e < 8; ++e) x += d[e] * s[e];
        }
        for (int mask = 1; mask < ROW_LANES; mask <<= 1) x += shfl_xor(x, mask);
        if (lane == 0 && row < n_q) row_dot[line] = x;
    }
}

// dQ = sum over the selected blocks of dS K, plus d_linear (fp32, or null). One tile of ROWS query
// rows per block of threads: grid (T_m PARTS, B H). row_mean (B H, n_q) is D over the weight of
// O_s; q_scale (B H, T_m) and k_scale (B H, T_n) are null unless the backward is matched. Shared
// memory: Q | dO | two K tiles | two V tiles, filled as in the forward. Formulas: README.md,
// "Backward".
extern "C" __global__ void __launch_bounds__(DQ_THREADS, 1)
sla2_sparse_bwd_q(const half_bits* __restrict__ q, const half_bits* __restrict__ k,
                  const half_bits* __restrict__ v, const half_bits* __restrict__ grad,
                  const float* __restrict__ lse, const float* __restrict__ row_mean,
                  const float* __restrict__ q_scale, const float* __restrict__ k_scale,
                  const int* __restrict__ indices, const int* __restrict__ counts,
                  int max_selected, const int* __restrict__ kv_lengths,
                  const float* __restrict__ rest_inverse, const float* __restrict__ alpha,
                  int alpha_stride_b, int alpha_stride_h, int alpha_stride_row,
                  const float* __restrict__ d_linear, half_bits* __restrict__ d_q,
                  int num_heads, int n_q, int n_k, float softmax_scale) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* q_tile = shared;
    unsigned char* grad_tile = q_tile + ROW_BYTES_ALL;
    unsigned char* k_ring = grad_tile + ROW_BYTES_ALL;
    unsigned char* v_ring = k_ring + 2 * KEY_BYTES;

    const int row_block = blockIdx.x / PARTS, item = blockIdx.y / num_heads;
    const int head = blockIdx.y % num_heads;
    const long long bh = blockIdx.y;
    const int t_m = gridDim.x / PARTS, first_row = blockIdx.x * ROWS;
    const int length = valid_keys(kv_lengths, item, n_k);
    const int* list = indices + (bh * t_m + row_block) * max_selected;
    const int steps =
        blocks_with_keys(list, first_row < n_q ? counts[bh * t_m + row_block] : 0, length);
    const long long alpha_at = static_cast<long long>(item) * alpha_stride_b +
                               head * alpha_stride_h + row_block * alpha_stride_row;
    const float weight =
        sparse_weight(alpha, alpha_at, rest_inverse, bh * t_m + row_block, steps > 0);
    k += bh * n_k * HEAD_DIM, v += bh * n_k * HEAD_DIM;
    if (MATCHED) k_scale += bh * ceil_div(n_k, BLOCK_K);

    const int lane = threadIdx.x & 31, row0 = first_row_of_warp(), g = lane >> 2;
    const int column = (lane & 3) * 2, key0 = half_of_keys() * WARP_KEYS;
    float l[2], mean[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + row0 + 8 * r + g;
        l[r] = row < n_q && steps > 0 ? lse[bh * n_q + row] * LOG2_E : 0.0f;
        mean[r] = row < n_q && steps > 0 ? row_mean[bh * n_q + row] : 0.0f;
    }
    float acc[D_TILES][4];
    clear(acc);
    // P = 2^(s scale - L log2(e)) needs no maximum: L is known. w, and 1 / sqrt(d) of dS -> dQ, go
    // into one factor of dS.
    const float scale = softmax_scale * LOG2_E * scale_of_block(q_scale, bh * t_m + row_block);
    const float gradient_scale = softmax_scale * weight * IN_FACTOR;
    if (steps > 0) {  // committed with the first K by walk_blocks
        const long long rows_at = (bh * n_q + first_row) * HEAD_DIM;
        load_tile<ROWS, HALF_ROW, DQ_THREADS>(q_tile, q + rows_at, HALF_ROW, n_q - first_row);
        load_tile<ROWS, HALF_ROW, DQ_THREADS>(grad_tile, grad + rows_at, HALF_ROW, n_q - first_row);
    }
    float p[WARP_KEYS / 8][4];
    walk_blocks(
        k, v, list, steps, length, k_ring, v_ring,
        [&](const unsigned char* k_tile, int) {
            clear(p);
            product_over_channels<DQ_UNROLL>(p, q_tile, row0, k_tile);
        },
        [&](const unsigned char* k_tile, const unsigned char* v_tile, int block) {
            float d_p[WARP_KEYS / 8][4];
            clear(d_p);
            product_over_channels<DQ_UNROLL>(d_p, grad_tile, row0, v_tile);
            const int valid = length - block * BLOCK_K - key0;
            const float key_scale = scale_of_block(k_scale, block);
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {  // row e >> 1 of the lane's two, column e & 1
                    const float probability =
                        8 * n + column + (e & 1) < valid
                            ? exp2_approx(p[n][e] * (scale * key_scale) - l[e >> 1])
                            : 0.0f;
                    p[n][e] =
                        probability * (d_p[n][e] - mean[e >> 1]) * (gradient_scale * key_scale);
                }
            product_over_rows(acc, p, k_tile);
        });
    if (KEY_HALVES == 2) {
        join<DQ_THREADS>(acc, reinterpret_cast<float*>(k_ring));
        if (key0 > 0) return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + row0 + 8 * r + g;
        if (row >= n_q) continue;
#pragma unroll
        for (int n = 0; n < D_TILES; ++n) {
            const long long at = (bh * n_q + row) * HEAD_DIM + 8 * n + column;
            float2 x;
            x.x = acc[n][2 * r] * OUT_FACTOR, x.y = acc[n][2 * r + 1] * OUT_FACTOR;
            if (d_linear != nullptr) {
                const float2 rest = *reinterpret_cast<const float2*>(d_linear + at);
                x.x += rest.x, x.y += rest.y;
            }
            *reinterpret_cast<unsigned*>(d_q + at) = pack_half(x.x, x.y);
        }
    }
}

// dK = sum over the query blocks that chose a key block of dS^T Q, dV of (w P)^T dO. d_k is fp32,
// d_v 16 bit. rest_k and rest_v, fp32 or null, are added: a row of D a token (B H, n_k, D), of the
// linear branch, where rest_k may be d_k; or, `by_block`, a row a key block (B H, T_n, D), of the
// pooled complement. key_sum (B H, T_n + slices, D) takes the block's column sums of dK for the
// smoothing's backward. Of a column that is cut (columns.cuh) the slices' sums go to `sliced`, fp32
// (B H, slices, 2, BLOCK_K, D), dK and dV, and their column sums to rows T_n + slice of key_sum,
// whose own row is 0; finish_kv adds them. row_mean, q_scale, k_scale as in sparse_bwd_q; row_top
// (B H, n_q), the largest P of a row, is null unless the backward is matched. Grid (B H (T_n +
// slices)). Shared memory: K | V | two Q tiles | two dO tiles | L, row_mean and row_top of their
// rows.
extern "C" __global__ void __launch_bounds__(DKV_THREADS, 1)
sla2_sparse_bwd_kv(const half_bits* __restrict__ q, const half_bits* __restrict__ k,
                   const half_bits* __restrict__ v, const half_bits* __restrict__ grad,
                   const float* __restrict__ lse, const float* __restrict__ row_mean,
                   const float* __restrict__ row_top, const float* __restrict__ q_scale,
                   const float* __restrict__ k_scale, const int* __restrict__ offsets,
                   const int* __restrict__ column_rows, long long capacity,
                   const int* __restrict__ slice_offsets, const int* __restrict__ slice_columns,
                   int slices, const int* __restrict__ kv_lengths,
                   const float* __restrict__ rest_inverse, const float* __restrict__ alpha,
                   int alpha_stride_b, int alpha_stride_h, int alpha_stride_row,
                   const float* rest_k, const float* __restrict__ rest_v, float* d_k,
                   half_bits* __restrict__ d_v, float* __restrict__ key_sum,
                   float* __restrict__ sliced, int pairs, int num_heads, int n_q, int n_k, int t_m,
                   int by_block, float softmax_scale) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* k_tile = shared;
    unsigned char* v_tile = k_tile + KEY_BYTES;
    unsigned char* q_ring = v_tile + KEY_BYTES;
    unsigned char* grad_ring = q_ring + 2 * ROW_BYTES_ALL;
    // [slot][L, mean, limit / top, top / limit][ROWS]
    float* row_values = reinterpret_cast<float*>(grad_ring + 2 * ROW_BYTES_ALL);
    float* sums = reinterpret_cast<float*>(q_ring);  // [warp][D], after the main loop

    const int lane = threadIdx.x & 31, g = lane >> 2, column = (lane & 3) * 2;
    const int row0 = first_key_of_warp(), half = half_of_rows();
    const float* own_values = row_values + half * WARP_ROWS + column;
    const int t_n = ceil_div(n_k, BLOCK_K);
    const ColumnMap map = {offsets,       column_rows, capacity, slice_offsets,
                           slice_columns, slices,      t_n,      pairs};
    const Part part = part_of(map, blockIdx.x);
    if (part.column < 0) return;
    if (part.count < 0) {
        for (int c = threadIdx.x; c < HEAD_DIM; c += DKV_THREADS)
            key_sum[sum_row(map, part) * HEAD_DIM + c] = 0.0f;
        return;
    }
    const int item = static_cast<int>(part.bh) / num_heads;
    const int head = static_cast<int>(part.bh) % num_heads;
    const int first_key = part.column * BLOCK_K;
    const long long row_at = part.bh * n_q, key_block = part.bh * t_n + part.column;
    const long long key_at = (part.bh * n_k + first_key) * HEAD_DIM;
    const int valid = clamp_int(valid_keys(kv_lengths, item, n_k) - first_key, 0, BLOCK_K);
    const int steps = valid > 0 ? part.count * PARTS : 0;
    const float* alpha_of_head =
        alpha + static_cast<long long>(item) * alpha_stride_b + head * alpha_stride_h;

    // Step t takes tile t % PARTS of the query block that is t / PARTS-th in the part's list.
    auto load_rows = [&](int step) {
        const int slot = step & 1;
        const int first = part.list[step / PARTS] * BLOCK_Q + step % PARTS * ROWS;
        const int inside = first < n_q ? n_q - first : 0;
        const long long at = inside > 0 ? row_at + first : 0;
        load_tile<ROWS, HALF_ROW, DKV_THREADS>(q_ring + slot * ROW_BYTES_ALL, q + at * HEAD_DIM,
                                               HALF_ROW, inside);
        load_tile<ROWS, HALF_ROW, DKV_THREADS>(grad_ring + slot * ROW_BYTES_ALL,
                                               grad + at * HEAD_DIM, HALF_ROW, inside);
        for (int i = threadIdx.x; i < ROWS; i += DKV_THREADS) {
            float* values = row_values + ROW_VALUES * slot * ROWS + i;
            values[0] = i < inside ? lse[at + i] * LOG2_E : 0.0f;
            values[ROWS] = i < inside ? row_mean[at + i] : 0.0f;
            if (MATCHED) {
                const float top = i < inside ? row_top[at + i] : 1.0f;
                values[2 * ROWS] = PV_LIMIT / top, values[3 * ROWS] = top / PV_LIMIT;
            }
        }
    };

    float acc_k[D_TILES][4], acc_v[D_TILES][4];
    clear(acc_k);
    clear(acc_v);
    const float scale = softmax_scale * LOG2_E * scale_of_block(k_scale, key_block);
    if (steps > 0) {
        load_tile<BLOCK_K, HALF_ROW, DKV_THREADS>(k_tile, k + key_at, HALF_ROW, valid);
        load_tile<BLOCK_K, HALF_ROW, DKV_THREADS>(v_tile, v + key_at, HALF_ROW, valid);
    }
    float weight, row_scale;  // of the step's query block
    walk_rows<DKV_UNROLL>(
        acc_k, acc_v, k_tile, v_tile, q_ring, grad_ring, steps, load_rows,
        [&](float (&p)[WARP_ROWS / 8][4], int step) {
            const int row_block = part.list[step / PARTS];
            const long long row = part.bh * t_m + row_block;
            weight = sparse_weight(alpha_of_head, row_block * alpha_stride_row, rest_inverse,
                                   row, true);
            row_scale = scale_of_block(q_scale, row);
            const float* l = own_values + ROW_VALUES * (step & 1) * ROWS;
#pragma unroll
            for (int n = 0; n < WARP_ROWS / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)  // a query row's values go by columns here
                    p[n][e] = exp2_approx(p[n][e] * (scale * row_scale) - l[8 * n + (e & 1)]);
        },
        [&](float (&p)[WARP_ROWS / 8][4], float (&d_p)[WARP_ROWS / 8][4], int step) {
            const float* mean = own_values + (ROW_VALUES * (step & 1) + 1) * ROWS;
            // P = exp(S - L) -> P~ = exp(S - rowmax) in units of the 8-bit format.
            const float* to_format = mean + ROWS;
            const float* from_format = to_format + ROWS;
            const float gradient_scale = softmax_scale * weight * IN_FACTOR * row_scale;
#pragma unroll
            for (int n = 0; n < WARP_ROWS / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int row = 8 * n + (e & 1);
                    d_p[n][e] = p[n][e] * (d_p[n][e] - mean[row]) * gradient_scale;
                    if (MATCHED)
                        p[n][e] =
                            round_value<PV_FP8>(p[n][e] * to_format[row]) * from_format[row];
                    p[n][e] *= weight;
                }
        });
    if (ROW_HALVES == 2) {
        join<DKV_THREADS>(acc_v, reinterpret_cast<float*>(q_ring));
        join<DKV_THREADS>(acc_k, reinterpret_cast<float*>(k_tile));
    }

    if (half == 0) {
#pragma unroll
        for (int n = 0; n < D_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc_k[n][e] *= OUT_FACTOR;
        if (rest_k != nullptr && part.first) {
            const long long rest_at = by_block ? key_block * HEAD_DIM : key_at;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = row0 + 8 * r + g;
                if (row >= valid) continue;
                const long long from = rest_at + (by_block ? 0 : row * HEAD_DIM) + column;
#pragma unroll
                for (int n = 0; n < D_TILES; ++n) {
                    const float2 x = *reinterpret_cast<const float2*>(rest_k + from + 8 * n);
                    const float2 y = *reinterpret_cast<const float2*>(rest_v + from + 8 * n);
                    acc_k[n][2 * r] += x.x, acc_k[n][2 * r + 1] += x.y;
                    acc_v[n][2 * r] += y.x, acc_v[n][2 * r + 1] += y.y;
                }
            }
        }
        float* to_k = part.slice < 0 ? d_k + key_at : slice_sums(sliced, map, part);
#pragma unroll
        for (int n = 0; n < D_TILES; ++n) {
            float below[2] = {0.0f, 0.0f};
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = row0 + 8 * r + g;
                if (first_key + row >= n_k) continue;
                float2 x;
                x.x = row < valid ? acc_k[n][2 * r] : 0.0f;
                x.y = row < valid ? acc_k[n][2 * r + 1] : 0.0f;
                *reinterpret_cast<float2*>(to_k + row * HEAD_DIM + 8 * n + column) = x;
                below[0] += x.x, below[1] += x.y;
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                // Over the eight g: lanes of one column differ in bits 2 to 4.
                for (int mask = 4; mask < 32; mask <<= 1) below[e] += shfl_xor(below[e], mask);
                if (g == 0) sums[row0 / 16 * HEAD_DIM + 8 * n + column + e] = below[e];
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row0 + 8 * r + g, at = row * HEAD_DIM + column;
            if (first_key + row >= n_k) continue;
            if (part.slice < 0) {
#pragma unroll
                for (int n = 0; n < D_TILES; ++n)
                    *reinterpret_cast<unsigned*>(d_v + key_at + at + 8 * n) =
                        row < valid ? pack_half(acc_v[n][2 * r], acc_v[n][2 * r + 1]) : 0u;
            } else {
#pragma unroll
                for (int n = 0; n < D_TILES; ++n) {
                    float2 y;
                    y.x = acc_v[n][2 * r], y.y = acc_v[n][2 * r + 1];
                    *reinterpret_cast<float2*>(to_k + BLOCK_K * HEAD_DIM + at + 8 * n) = y;
                }
            }
        }
    }
    __syncthreads();
#pragma unroll 1  // a trip or two: there are seldom fewer threads
    for (int c = threadIdx.x; c < HEAD_DIM; c += DKV_THREADS) {
        float sum = 0.0f;
        for (int w = 0; w < BLOCK_K / 16; ++w) sum += sums[w * HEAD_DIM + c];
        key_sum[sum_row(map, part) * HEAD_DIM + c] = sum;
    }
}

// What is left of dK and dV. out = d_k - mean over the valid tokens (mean (B H, D) null: K was not
// smoothed) in 16 bit, 0 at padding tokens. In columns that are cut d_k is the sum of the slices,
// in their order, and so is d_v, which is written there alone. Grid (ceil(n_k D / 1024), B H), 256
// threads, 4 channels each.
extern "C" __global__ void __launch_bounds__(256)
sla2_finish_kv(const float* __restrict__ d_k, const float* __restrict__ mean,
               const int* __restrict__ slice_offsets, const float* __restrict__ sliced, int slices,
               const int* __restrict__ kv_lengths, half_bits* __restrict__ out,
               half_bits* __restrict__ d_v, int num_heads, int n_k) {
    const long long bh = blockIdx.y, base = bh * n_k * HEAD_DIM;
    const int length = valid_keys(kv_lengths, blockIdx.y / num_heads, n_k);
    const int i = (blockIdx.x * 256 + threadIdx.x) * 4, token = i / HEAD_DIM;
    if (token >= n_k) return;
    auto packed = [&](const float4& x) {
        uint2 y = {0u, 0u};
        if (token < length) y.x = pack_half(x.x, x.y), y.y = pack_half(x.z, x.w);
        return y;
    };
    auto add = [](float4& x, const float* from, float sign) {
        const float4 y = *reinterpret_cast<const float4*>(from);
        x.x += sign * y.x, x.y += sign * y.y, x.z += sign * y.z, x.w += sign * y.w;
    };
    const int* cuts = slice_offsets + bh * (ceil_div(n_k, BLOCK_K) + 1) + token / BLOCK_K;
    const int first = slices > 0 ? cuts[0] : 0, last = slices > 0 ? cuts[1] : 0;
    float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
    if (first == last) {
        x = *reinterpret_cast<const float4*>(d_k + base + i);
    } else {
        const float* from = sliced + 2 * (bh * slices + first) * BLOCK_K * HEAD_DIM +
                            i % (BLOCK_K * HEAD_DIM);
        float4 y = x;
#pragma unroll 1
        for (int slice = first; slice < last; ++slice, from += 2 * BLOCK_K * HEAD_DIM)
            add(x, from, 1.0f), add(y, from + BLOCK_K * HEAD_DIM, 1.0f);
        *reinterpret_cast<uint2*>(d_v + base + i) = packed(y);
    }
    if (mean != nullptr) add(x, mean + bh * HEAD_DIM + i % HEAD_DIM, -1.0f);
    *reinterpret_cast<uint2*>(out + base + i) = packed(x);
}
