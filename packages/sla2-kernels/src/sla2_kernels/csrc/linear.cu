// Linear states: h_j = phi(K_j)^T V_j and z_j per key block, and H = (1 - M) h as one tensor-core
// product per head.
#include "tile.cuh"

constexpr int STATE = HEAD_DIM * (HEAD_DIM + 1);  // h_j row by row, then z_j
constexpr int STATE_THREADS = HEAD_DIM * 2;  // a warp per 16 channels of phi

// states (B H, T_n, D (D + 1)) in 16 bit: h_j / BLOCK_K and z_j / BLOCK_K, so that they stay within
// the range of V. Grid (T_n, B H). phi_k (B H, n_k, D) is 0 at padding tokens; v by its strides.
extern "C" __global__ void __launch_bounds__(STATE_THREADS)
sla2_states(const half_bits* __restrict__ phi_k, const half_bits* __restrict__ v,
            long long v_item, long long v_head, int v_step, const int* __restrict__ kv_lengths,
            half_bits* __restrict__ states, int num_heads, int n_k) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* phi_tile = shared;
    unsigned char* v_tile = shared + BLOCK_K * HALF_ROW;
    const long long bh = blockIdx.y;
    const int first = blockIdx.x * BLOCK_K, item = blockIdx.y / num_heads;
    const int head = blockIdx.y % num_heads;
    const int valid = valid_keys(kv_lengths, item, n_k) - first;
    const long long v_at = item * v_item + head * v_head + static_cast<long long>(first) * v_step;
    load_tile<BLOCK_K, HALF_ROW, STATE_THREADS>(phi_tile, phi_k + (bh * n_k + first) * HEAD_DIM,
                                                HALF_ROW, valid);
    load_tile<BLOCK_K, HALF_ROW, STATE_THREADS>(v_tile, v + v_at, 2 * v_step, valid);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    const int lane = threadIdx.x & 31, row0 = threadIdx.x / 32 * 16, g = lane >> 2;
    const int column = (lane & 3) * 2;
    // Rows of acc are channels of phi, columns channels of V, the depth is tokens: both tiles are
    // stored [token][channel], so both operands are read transposed.
    float acc[D_TILES][4];
    clear(acc);
#pragma unroll
    for (int c = 0; c < BLOCK_K / 16; ++c) {
        unsigned a[4];
        load_a_trans<HALF_ROW>(a, phi_tile, 16 * c, row0);
#pragma unroll
        for (int n = 0; n < D_TILES; n += 2) {
            unsigned b[4];
            load_b_trans<HALF_ROW>(b, v_tile, 16 * c, 8 * n);
            mma_half(acc[n], a, &b[0]);
            mma_half(acc[n + 1], a, &b[2]);
        }
    }
    constexpr float SHARE = 1.0f / BLOCK_K;
    half_bits* target = states + (bh * gridDim.x + blockIdx.x) * STATE;
#pragma unroll
    for (int n = 0; n < D_TILES; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            *reinterpret_cast<unsigned*>(target + (row0 + 8 * r + g) * HEAD_DIM + 8 * n + column) =
                pack_half(acc[n][2 * r] * SHARE, acc[n][2 * r + 1] * SHARE);
    // z_j: a thread adds one channel over the tokens, where the swizzle has put it.
    for (int c = threadIdx.x; c < HEAD_DIM; c += STATE_THREADS) {
        float sum = 0.0f;
        for (int row = 0; row < BLOCK_K; ++row)
            sum += half_to_float(*reinterpret_cast<const half_bits*>(
                phi_tile + tile_offset<HALF_ROW>(row, c / 8) + c % 8 * 2));
        target[HEAD_DIM * HEAD_DIM + c] = float_to_half(sum * SHARE);
    }
}

constexpr int SUM_ROWS = 128, SUM_COLUMNS = 128, SUM_DEPTH = 32, SUM_STAGES = 4, SUM_THREADS = 256;
constexpr int SUM_ROW_BYTES = SUM_COLUMNS * 2;
constexpr int SUM_STAGE_BYTES = SUM_DEPTH * SUM_ROW_BYTES;

// sums_i = row_scale_i * sum over j with bit (i, j) clear of x_j: the dense product (1 - M) x, M
// expanded from bits in registers. x (B H, depth, D (D + 1)) in 16 bit; matrix (B H, rows, D D) in
// 16 bit and vector (B H, rows, D) in fp32 take the first D D columns and the last D. row_scale
// (B H, rows) may be null. Forward: x = states, M the map, row_scale the inverse of the number of
// blocks summed. Backward: x = d states, M transposed. Grid (ceil(D (D + 1) / 128),
// ceil(rows / 128), B H); 8 warps of 32 rows x 64 columns over a ring of 4 stages of 32 j each.
// Blocks of padding are summed like the others: their states are zeros.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
sla2_masked_sum(const unsigned* __restrict__ bits, const half_bits* __restrict__ x,
                const float* __restrict__ row_scale, half_bits* __restrict__ matrix,
                float* __restrict__ vector, int rows, int depth) {
    SLA2_DYNAMIC_SHARED(shared);
    const int column0 = blockIdx.x * SUM_COLUMNS, row0 = blockIdx.y * SUM_ROWS;
    const long long bh = blockIdx.z;
    const int words = ceil_div(depth, 32), steps = words;
    x += bh * depth * STATE + column0;
    bits += bh * rows * words;
    const int chunk = threadIdx.x % (SUM_ROW_BYTES / 16);
    const int line0 = threadIdx.x / (SUM_ROW_BYTES / 16);
    const bool inside = column0 + 8 * chunk < STATE;

    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 64, g = lane >> 2, q = lane & 3;
    float acc[2][8][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;

    auto load_stage = [&](int step) {
        unsigned char* stage = shared + step % SUM_STAGES * SUM_STAGE_BYTES;
#pragma unroll
        for (int line = line0; line < SUM_DEPTH; line += SUM_THREADS / (SUM_ROW_BYTES / 16)) {
            const int j = step * SUM_DEPTH + line;
            const bool valid = inside && j < depth;
            cp_async_16(stage + tile_offset<SUM_ROW_BYTES>(line, chunk),
                        valid ? x + static_cast<long long>(j) * STATE + 8 * chunk : x,
                        valid ? 16 : 0);
        }
    };
    // One group a stage, empty where there is none: three are in flight when the loop begins.
    for (int step = 0; step < SUM_STAGES - 1; ++step) {
        if (step < steps) load_stage(step);
        cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        // The 32 bits of this step for the lane's four rows, inverted: 1 - M. Bits past `depth`
        // become ones, but their x is zero.
        unsigned word[2][2];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = row0 + warp_row + 16 * m + 8 * r + g;
                word[m][r] = row < rows ? ~bits[static_cast<long long>(row) * words + step] : 0u;
            }
        // The two newest groups may travel: this stage is here. After the barrier nobody reads the
        // stage before, whose slot the load three steps ahead takes.
        cp_async_wait<SUM_STAGES - 2>();
        __syncthreads();
        if (step + SUM_STAGES - 1 < steps) load_stage(step + SUM_STAGES - 1);
        cp_async_commit();
        const unsigned char* stage = shared + step % SUM_STAGES * SUM_STAGE_BYTES;
#pragma unroll
        for (int c = 0; c < SUM_DEPTH / 16; ++c) {
            unsigned a[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
                // Register r of the A operand: row g + 8 (r & 1), depths 2 q and 2 q + 1 of the
                // left (r < 2) or right eight: two neighbouring bits, each made a 16-bit 0 or 1.
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const unsigned pair = word[m][r & 1] >> (16 * c + 8 * (r >> 1) + 2 * q);
                    a[m][r] = (pair & 1u) * ONE_BITS | (pair >> 1 & 1u) * (ONE_BITS << 16);
                }
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                unsigned b[4];
                load_b_trans<SUM_ROW_BYTES>(b, stage, 16 * c, warp_column + 8 * n);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    mma_half(acc[m][n], a[m], &b[0]);
                    mma_half(acc[m][n + 1], a[m], &b[2]);
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row0 + warp_row + 16 * m + 8 * r + g;
            if (row >= rows) continue;
            const long long line = bh * rows + row;
            const float scale = row_scale == nullptr ? 1.0f : row_scale[line];
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const int column = column0 + warp_column + 8 * n + 2 * q;
                const float a = acc[m][n][2 * r] * scale, b = acc[m][n][2 * r + 1] * scale;
                if (column < HEAD_DIM * HEAD_DIM) {
                    *reinterpret_cast<unsigned*>(matrix + line * HEAD_DIM * HEAD_DIM + column) =
                        pack_half(a, b);
                } else if (column < STATE) {
                    vector[line * HEAD_DIM + column - HEAD_DIM * HEAD_DIM] = a;
                    vector[line * HEAD_DIM + column - HEAD_DIM * HEAD_DIM + 1] = b;
                }
            }
        }
}
