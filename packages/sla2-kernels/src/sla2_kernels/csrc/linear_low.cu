// H = (1 - M) h in low bit: linear.cu's product on states in 8 bit.
#include "states.cuh"
#include "tile.cuh"

constexpr int SUM_ROWS = 128, SUM_COLUMNS = 128, SUM_DEPTH = 32, SUM_STAGES = 8, SUM_THREADS = 256;
constexpr int SUM_STAGE_BYTES = SUM_DEPTH * SUM_COLUMNS;
static_assert(HEAD_DIM * HEAD_DIM % SUM_COLUMNS == 0, "no tile holds both matrices and vectors");
static_assert(2 * HEAD_DIM % SUM_COLUMNS == 0, "all tiles are whole");

// Adds 32 key blocks to a warp's sums of 32 rows (16 in even0 and odd0, 16 in the others) and 16
// columns, even and odd ones apart. `weights` are A operands of bytes, of blocks in the order of
// weight_place; pairs[i] holds two columns of blocks 8 i + 2 q and 8 i + 2 q + 1, as ldmatrix
// leaves them.
SLA2_INLINE void add_blocks(float (&even0)[4], float (&odd0)[4], float (&even1)[4],
                            float (&odd1)[4], const unsigned (&weights)[2][4],
                            const unsigned (&pairs)[4]) {
    if (FP8_MMA) {
        unsigned even[2], odd[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            even[i] = __byte_perm(pairs[i], pairs[i + 2], 0x6240);
            odd[i] = __byte_perm(pairs[i], pairs[i + 2], 0x7351);
        }
        mma_m16n8k32_e4m3(even0, weights[0], even);
        mma_m16n8k32_e4m3(odd0, weights[0], odd);
        mma_m16n8k32_e4m3(even1, weights[1], even);
        mma_m16n8k32_e4m3(odd1, weights[1], odd);
        return;
    }
    // Bytes 0 and 2 of a register of weights are those of 16 blocks, 1 and 3 of the next 16.
    unsigned even[4], odd[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned columns = __byte_perm(pairs[i], 0u, 0x3120);
        even[i] = e4m3x2_to_f16x2(static_cast<unsigned short>(columns & 0xffffu));
        odd[i] = e4m3x2_to_f16x2(static_cast<unsigned short>(columns >> 16));
    }
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            unsigned a[4];
#pragma unroll
            for (int r = 0; r < 4; ++r)
                a[r] = (c == 0 ? weights[m][r] << 8 : weights[m][r]) & 0xff00ff00u;
            mma_m16n8k16_f16(m == 0 ? even0 : even1, a, &even[2 * c]);
            mma_m16n8k16_f16(m == 0 ? odd0 : odd1, a, &odd[2 * c]);
        }
}

// As sla2_masked_sum, for x (B H, depth, STATE_BYTES) in E4M3 with a weight a block, `weights`
// (B H, padded_weights(depth)), and value_scale (B H, D) of V's channels, all as keys_low.cu writes
// them. row_scale is not null. Grid (D (D + 2) / 128, ceil(rows / 128), B H); 8 warps of 32 rows x
// 64 columns over a ring of 8 stages of 32 blocks each.
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 2)
sla2_masked_sum_low(const unsigned* __restrict__ bits, const unsigned char* __restrict__ x,
                    const unsigned char* __restrict__ weights,
                    const float* __restrict__ value_scale, const float* __restrict__ row_scale,
                    half_bits* __restrict__ matrix, float* __restrict__ vector, int rows,
                    int depth) {
    SLA2_DYNAMIC_SHARED(shared);
    const int column0 = blockIdx.x * SUM_COLUMNS, row0 = blockIdx.y * SUM_ROWS;
    const long long bh = blockIdx.z;
    const int words = ceil_div(depth, 32), steps = words;
    constexpr int CHUNKS = SUM_COLUMNS / 16;
    const int chunk = threadIdx.x % CHUNKS, line = threadIdx.x / CHUNKS;
    static_assert(SUM_THREADS / CHUNKS == SUM_DEPTH, "a thread copies 16 bytes of a stage");
    x += bh * depth * STATE_BYTES + column0 + 16 * chunk;
    weights += bh * padded_weights(depth);
    bits += bh * rows * words;

    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 64, g = lane >> 2, q = lane & 3;
    const int line_at = (row0 + warp_row + g) * words;  // in the head's bits
    float acc[2][8][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) clear(acc[m]);

    auto load_stage = [&](int step) {
        const int j = step * SUM_DEPTH + line;
        cp_async_16(shared + step % SUM_STAGES * SUM_STAGE_BYTES +
                        tile_offset<SUM_COLUMNS>(line, chunk),
                    x + static_cast<long long>(j < depth ? j : 0) * STATE_BYTES,
                    j < depth ? 16 : 0);
    };
    // One group a stage, empty where there is none: seven are in flight when the loop begins.
    for (int step = 0; step < SUM_STAGES - 1; ++step) {
        if (step < steps) load_stage(step);
        cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        // The bits of this step for the lane's four rows, inverted: 1 - M. Bits past `depth` become
        // ones, but their weights are zero.
        unsigned word[2][2];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = row0 + warp_row + 16 * m + 8 * r + g;
                word[m][r] = row < rows ? ~bits[line_at + (16 * m + 8 * r) * words + step] : 0u;
            }
        const uint2 weight = *reinterpret_cast<const uint2*>(weights + 32 * step + 8 * q);
        // The six newest groups may travel: this stage is here. After the barrier nobody reads the
        // stage before, whose slot the load seven steps ahead takes.
        cp_async_wait<SUM_STAGES - 2>();
        __syncthreads();
        if (step + SUM_STAGES - 1 < steps) load_stage(step + SUM_STAGES - 1);
        cp_async_commit();
        const unsigned char* stage = shared + step % SUM_STAGES * SUM_STAGE_BYTES;
        // Register r of the A operand: row g + 8 (r & 1), four blocks whose bits are q + 8 i
        // (r < 2) or q + 4 + 8 i: each, as the sign of a byte, lets its weight pass.
        unsigned a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const unsigned signs = word[m][r & 1] << 3 - q;
                a[m][r] = r < 2 ? byte_signs(signs << 4) & weight.x : byte_signs(signs) & weight.y;
            }
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            unsigned pairs[4];
            ldmatrix_x4_trans(pairs, stage + lane_offset<SUM_COLUMNS>(lane, 0, 0,
                                                                      warp_column / 16 + n / 2));
            add_blocks(acc[0][n], acc[0][n + 1], acc[1][n], acc[1][n + 1], a, pairs);
        }
    }
    float scale[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row0 + warp_row + 16 * m + 8 * r + g;
            scale[m][r] = row < rows ? row_scale[bh * rows + row] * WEIGHT_UNIT : 0.0f;
        }
    if (column0 < HEAD_DIM * HEAD_DIM) {  // a tile of 128 columns holds matrices, or vectors
#pragma unroll
        for (int n = 0; n < 8; n += 2) {  // of 16 columns the lane has 4 q to 4 q + 3
            const int column = column0 + warp_column + 8 * n + 4 * q;
            const float4 by = *reinterpret_cast<const float4*>(value_scale + bh * HEAD_DIM +
                                                               column % HEAD_DIM);
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int row = row0 + warp_row + 16 * m + 8 * r + g;
                    const float* even = acc[m][n] + 2 * r;
                    const float* odd = acc[m][n + 1] + 2 * r;
                    const float factor = scale[m][r];
                    uint2 four;
                    four.x = pack_half(even[0] * factor * by.x, odd[0] * factor * by.y);
                    four.y = pack_half(even[1] * factor * by.z, odd[1] * factor * by.w);
                    if (row < rows)
                        *reinterpret_cast<uint2*>(
                            matrix + (bh * rows + row) * HEAD_DIM * HEAD_DIM + column) = four;
                }
        }
        return;
    }
    // First and second values are even and odd columns.
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row0 + warp_row + 16 * m + 8 * r + g;
            const float factor = scale[m][r] / NORM_UNIT;
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                const int channel = (column0 - HEAD_DIM * HEAD_DIM + warp_column) / 2 + 4 * n;
                const float* first = acc[m][n] + 2 * r;
                const float* second = acc[m][n + 1] + 2 * r;
                float2 pair;
                pair.x = (first[0] + second[0] / NORM_STEP) * factor;
                pair.y = (first[1] + second[1] / NORM_STEP) * factor;
                if (row < rows)
                    *reinterpret_cast<float2*>(vector + (bh * rows + row) * HEAD_DIM + channel +
                                               2 * q) = pair;
            }
        }
}
