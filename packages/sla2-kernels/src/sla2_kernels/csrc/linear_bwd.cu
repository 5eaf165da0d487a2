// Backward of the linear branch: dH, dZ and d phi(Q) by rows, then, after dh = (1 - M)^T dH,
// d phi(K) and dV by key blocks.
#include "tile.cuh"

constexpr int Q_THREADS = 2 * BLOCK_Q;  // 16 rows a warp
constexpr int KV_THREADS = 2 * BLOCK_K;

// What linear_bwd_q keeps per query row between its two products.
struct RowFactors {
    float gain[BLOCK_Q];     // (1 - w) / (phi(Q) . Z)
    float d_below[BLOCK_Q];  // d (phi(Q) . Z)
    float mixing[BLOCK_Q];   // dO . (O_s - O_l)
};

// The lane's two phi values of accumulator tile n in row `row`.
SLA2_INLINE unsigned phi_pair(const unsigned char* phi_tile, int row, int n, int column) {
    return *reinterpret_cast<const unsigned*>(
        phi_tile + tile_offset<HALF_ROW>(row, n) + 2 * column);
}

// Softmax backward of rows g and g + 8 of the warp's 16: acc = d phi becomes phi
// (d phi - phi . d phi).
SLA2_INLINE void softmax_backward(float (&acc)[D_TILES][4], const unsigned char* phi_tile,
                                  int row0) {
    const int lane = threadIdx.x & 31, g = lane >> 2, column = (lane & 3) * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = row0 + 8 * r + g;
        float mean = 0.0f;
#pragma unroll
        for (int n = 0; n < D_TILES; ++n) {
            const unsigned pair = phi_pair(phi_tile, row, n, column);
            mean += low_half(pair) * acc[n][2 * r] + high_half(pair) * acc[n][2 * r + 1];
        }
        mean = quad_sum(mean);
#pragma unroll
        for (int n = 0; n < D_TILES; ++n) {
            const unsigned pair = phi_pair(phi_tile, row, n, column);
            acc[n][2 * r] = low_half(pair) * (acc[n][2 * r] - mean);
            acc[n][2 * r + 1] = high_half(pair) * (acc[n][2 * r + 1] - mean);
        }
    }
}

// Per query block: d_q (B H, n_q, D) fp32, the linear branch's part of dQ; d_states
// (B H, T_m, D (D + 1)) in 16 bit, dH and dZ divided by the number of blocks that H sums (which
// makes them gradients of the plain sums); and d_alpha (B H, T_m) = sum over the rows of
// dO . (O_s - O_l), from row_dot = dO . O_s. With A = dO H^T, which d phi needs anyway, dO . O_l is
// phi . A / (phi . Z): O_l is not kept by the forward. Grid (T_m, B H). Shared memory:
// phi(Q) | dO | H | RowFactors.
extern "C" __global__ void __launch_bounds__(Q_THREADS, 2)
sla2_linear_bwd_q(const half_bits* __restrict__ q, const half_bits* __restrict__ grad,
                  const half_bits* __restrict__ state, const float* __restrict__ norm,
                  const float* __restrict__ row_dot, const float* __restrict__ lse,
                  const float* __restrict__ rest_inverse, const float* __restrict__ alpha,
                  int alpha_stride_b, int alpha_stride_h, int alpha_stride_row,
                  float* __restrict__ d_q, half_bits* __restrict__ d_states,
                  float* __restrict__ d_alpha, int num_heads, int n_q, int channels) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* phi_tile = shared;
    unsigned char* grad_tile = phi_tile + BLOCK_Q * HALF_ROW;
    unsigned char* state_tile = grad_tile + BLOCK_Q * HALF_ROW;
    RowFactors& factors = *reinterpret_cast<RowFactors*>(state_tile + HEAD_DIM * HALF_ROW);
    const long long bh = blockIdx.y, block = bh * gridDim.x + blockIdx.x;
    const int first = blockIdx.x * BLOCK_Q, rows = n_q - first < BLOCK_Q ? n_q - first : BLOCK_Q;
    const long long line = bh * n_q + first;
    half_bits* target = d_states + block * STATE;
    const float share = rest_inverse[block];
    if (share == 0.0f) {  // no complement: nothing flows
        for (int i = threadIdx.x; i < rows * HEAD_DIM; i += Q_THREADS)
            d_q[line * HEAD_DIM + i] = 0.0f;
        for (int i = threadIdx.x; i < STATE; i += Q_THREADS) target[i] = 0;
        if (threadIdx.x == 0) d_alpha[block] = 0.0f;
        return;
    }
    load_tile<BLOCK_Q, HALF_ROW, Q_THREADS>(phi_tile, q + line * HEAD_DIM, HALF_ROW, rows);
    load_tile<BLOCK_Q, HALF_ROW, Q_THREADS>(grad_tile, grad + line * HEAD_DIM, HALF_ROW, rows);
    load_tile<HEAD_DIM, HALF_ROW, Q_THREADS>(state_tile, state + block * HEAD_DIM * HEAD_DIM,
                                             HALF_ROW, HEAD_DIM);
    cp_async_commit();
    // -inf, in all rows alike, where nothing is selected.
    const bool some = lse[line] != MINUS_INFINITY;
    const float weight =
        some ? alpha[static_cast<long long>(blockIdx.y / num_heads) * alpha_stride_b +
                     blockIdx.y % num_heads * alpha_stride_h + blockIdx.x * alpha_stride_row]
             : 0.0f;
    norm += block * HEAD_DIM;
    cp_async_wait<0>();
    __syncthreads();

    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, row0 = warp * 16, g = lane >> 2;
    const int column = (lane & 3) * 2;
    softmax_rows<16>(phi_tile, row0, channels);
    float acc[D_TILES][4];
    clear(acc);
    // A = dO H^T. Unrolled whole, it takes registers that a second block needs.
    product_over_channels<4>(acc, grad_tile, row0, state_tile);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = row0 + 8 * r + g;
        float below = 0.0f, above = 0.0f;
#pragma unroll
        for (int n = 0; n < D_TILES; ++n) {
            const unsigned pair = phi_pair(phi_tile, row, n, column);
            below +=
                low_half(pair) * norm[8 * n + column] + high_half(pair) * norm[8 * n + column + 1];
            above += low_half(pair) * acc[n][2 * r] + high_half(pair) * acc[n][2 * r + 1];
        }
        below = quad_sum(below), above = quad_sum(above);
        const float inverse = below == 0.0f ? 0.0f : 1.0f / below;
        const float gain = (1.0f - weight) * inverse, dot = above * inverse;  // dot = dO . O_l
        if ((lane & 3) == 0) {
            factors.gain[row] = gain;
            factors.d_below[row] = -gain * dot;
            factors.mixing[row] = row < rows ? row_dot[line + row] - dot : 0.0f;
        }
        // d phi = g (A - (dO . O_l) Z): README.md, "Linear branch".
#pragma unroll
        for (int n = 0; n < D_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                acc[n][2 * r + e] = gain * (acc[n][2 * r + e] - dot * norm[8 * n + column + e]);
    }
    softmax_backward(acc, phi_tile, row0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = row0 + 8 * r + g;
        if (row >= rows) continue;
#pragma unroll
        for (int n = 0; n < D_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                d_q[(line + row) * HEAD_DIM + 8 * n + column + e] = acc[n][2 * r + e];
    }
    __syncthreads();  // the factors of all rows are written
#pragma unroll 1  // a trip or two: there are seldom fewer threads
    for (int c = threadIdx.x; c < HEAD_DIM; c += Q_THREADS) {
        float sum = 0.0f;
        for (int row = 0; row < rows; ++row)
            sum += factors.d_below[row] *
                   half_to_float(*reinterpret_cast<const half_bits*>(
                       phi_tile + tile_offset<HALF_ROW>(row, c / 8) + c % 8 * 2));
        target[HEAD_DIM * HEAD_DIM + c] = float_to_half(sum * share);
    }
    if (warp == 0) {
        float sum = 0.0f;
        for (int row = lane; row < BLOCK_Q; row += 32) sum += factors.mixing[row];
        sum = warp_sum(sum);
        if (lane == 0) d_alpha[block] = some ? sum : 0.0f;
    }
    __syncthreads();
    // phi <- phi (1 - w) / (phi . Z), so that dH = phi^T dO.
    for (int i = threadIdx.x; i < rows * (HEAD_DIM / 2); i += Q_THREADS) {
        const int row = i / (HEAD_DIM / 2), pair = i % (HEAD_DIM / 2);
        unsigned* at = reinterpret_cast<unsigned*>(
            phi_tile + tile_offset<HALF_ROW>(row, pair / 4) + pair % 4 * 4);
        const float factor = factors.gain[row];
        *at = pack_half(low_half(*at) * factor, high_half(*at) * factor);
    }
    __syncthreads();
    // dH, 16 channels of phi at a time: as many tiles as D / 16, whatever the number of warps; 32
    // columns at a time, as `states` does.
    for (int tile = warp; tile < HEAD_DIM / 16; tile += Q_THREADS / 32) {
#pragma unroll 1
        for (int n = 0; n < D_TILES; n += 4) {
            float sums[4][4];
            clear(sums);
#pragma unroll
            for (int c = 0; c < BLOCK_Q / 16; ++c) {
                unsigned a[4];
                load_a_trans<HALF_ROW>(a, phi_tile, 16 * c, 16 * tile);
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    unsigned b[4];
                    load_b_trans<HALF_ROW>(b, grad_tile, 16 * c, 8 * (n + i));
                    mma_half(sums[i], a, &b[0]);
                    mma_half(sums[i + 1], a, &b[2]);
                }
            }
            store_fragments(sums, share, share, target + 16 * tile * HEAD_DIM + 8 * n, HEAD_DIM,
                            16);
        }
    }
}

// Per key block, from dh (B H, T_n, D, D) in 16 bit and dz (B H, T_n, D) in fp32: d_k (of the
// smoothed K) and d_v, fp32 (B H, n_k, D), 0 at padding tokens. k (B H, n_k, D) is smoothed. Grid
// (T_n, B H). Shared memory: phi(K) | V | dh.
extern "C" __global__ void __launch_bounds__(KV_THREADS)
sla2_linear_bwd_kv(const half_bits* __restrict__ k, const half_bits* __restrict__ v,
                   const half_bits* __restrict__ d_state, const float* __restrict__ d_norm,
                   const int* __restrict__ kv_lengths, float* __restrict__ d_k,
                   float* __restrict__ d_v, int num_heads, int n_k, int channels) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* phi_tile = shared;
    unsigned char* v_tile = phi_tile + BLOCK_K * HALF_ROW;
    unsigned char* state_tile = v_tile + BLOCK_K * HALF_ROW;
    const long long bh = blockIdx.y, block = bh * gridDim.x + blockIdx.x;
    const int first = blockIdx.x * BLOCK_K, rows = n_k - first < BLOCK_K ? n_k - first : BLOCK_K;
    const int valid =
        clamp_int(valid_keys(kv_lengths, blockIdx.y / num_heads, n_k) - first, 0, BLOCK_K);
    const long long at = (bh * n_k + first) * HEAD_DIM;
    load_tile<BLOCK_K, HALF_ROW, KV_THREADS>(phi_tile, k + at, HALF_ROW, valid);
    load_tile<BLOCK_K, HALF_ROW, KV_THREADS>(v_tile, v + at, HALF_ROW, valid);
    load_tile<HEAD_DIM, HALF_ROW, KV_THREADS>(state_tile, d_state + block * HEAD_DIM * HEAD_DIM,
                                              HALF_ROW, HEAD_DIM);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    constexpr float SHARE = 1.0f / BLOCK_K;
    const int lane = threadIdx.x & 31, row0 = threadIdx.x / 32 * 16, g = lane >> 2;
    const int column = (lane & 3) * 2;
    softmax_rows<16>(phi_tile, row0, channels);
    float acc[D_TILES][4];
    auto store = [&](float* target) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row0 + 8 * r + g;
            if (row >= rows) continue;
#pragma unroll
            for (int n = 0; n < D_TILES; ++n) {
                float2 pair;
                pair.x = row < valid ? acc[n][2 * r] * SHARE : 0.0f;
                pair.y = row < valid ? acc[n][2 * r + 1] * SHARE : 0.0f;
                *reinterpret_cast<float2*>(target + at + row * HEAD_DIM + 8 * n + column) = pair;
            }
        }
    };
    // d phi = V dh^T + dz, through the softmax.
    clear(acc);
    product_over_channels(acc, v_tile, row0, state_tile);
#pragma unroll
    for (int n = 0; n < D_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            acc[n][e] += d_norm[block * HEAD_DIM + 8 * n + column + (e & 1)];
    softmax_backward(acc, phi_tile, row0);
    store(d_k);

    // dV = phi(K) dh.
    clear(acc);
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; ++c) {
        unsigned a[4];
        load_a<HALF_ROW>(a, phi_tile, row0, 2 * c);
#pragma unroll
        for (int n = 0; n < D_TILES; n += 2) {
            unsigned b[4];
            load_b_trans<HALF_ROW>(b, state_tile, 16 * c, 8 * n);
            mma_half(acc[n], a, &b[0]);
            mma_half(acc[n + 1], a, &b[2]);
        }
    }
    store(d_v);
}
