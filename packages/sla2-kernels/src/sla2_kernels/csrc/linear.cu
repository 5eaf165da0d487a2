// H = (1 - M) h, what the linear branch of each row block sums, as one tensor-core product per
// head.
#include "tile.cuh"

constexpr int SUM_ROWS = 128, SUM_COLUMNS = 128, SUM_DEPTH = 32, SUM_STAGES = 4, SUM_THREADS = 256;
constexpr int SUM_ROW_BYTES = SUM_COLUMNS * 2;
constexpr int SUM_STAGE_BYTES = SUM_DEPTH * SUM_ROW_BYTES;
static_assert(HEAD_DIM * HEAD_DIM % SUM_COLUMNS == 0, "no tile holds both matrices and vectors");

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
    const unsigned* line_bits = bits + static_cast<long long>(row0 + warp_row + g) * words;
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
                word[m][r] = row < rows ? ~line_bits[(16 * m + 8 * r) * words + step] >> q : 0u;
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
                // left (r < 2) or right eight. Their bits are q + 4 r' and 16 more, each of which
                // becomes a 16-bit 0 or 1 by one AND and one multiplication.
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int bit = 4 * (r >> 1);
                    a[m][r] = (word[m][r & 1] >> 8 * c & 0x10001u << bit) * (ONE_BITS >> bit);
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
    float scale[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row0 + warp_row + 16 * m + 8 * r + g;
            scale[m][r] = row_scale == nullptr || row >= rows ? 1.0f : row_scale[bh * rows + row];
        }
    if (column0 < HEAD_DIM * HEAD_DIM) {  // a tile of 128 columns holds matrices, or vectors
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const long long first = row0 + warp_row + 16 * m;
            store_fragments(acc[m], scale[m][0], scale[m][1],
                            matrix + (bh * rows + first) * HEAD_DIM * HEAD_DIM + column0 +
                                warp_column,
                            HEAD_DIM * HEAD_DIM, rows - static_cast<int>(first));
        }
        return;
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row0 + warp_row + 16 * m + 8 * r + g;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const int column = column0 - HEAD_DIM * HEAD_DIM + warp_column + 8 * n + 2 * q;
                if (row >= rows || column >= HEAD_DIM) continue;
                float2 pair;
                pair.x = acc[m][n][2 * r] * scale[m][r];
                pair.y = acc[m][n][2 * r + 1] * scale[m][r];
                *reinterpret_cast<float2*>(vector + (bh * rows + row) * HEAD_DIM + column) = pair;
            }
        }
}
