// Tiles in shared memory: XOR-swizzled rows of 16-byte chunks, cp.async loads, and mma fragments
// read by ldmatrix. Which lane holds what is drawn in README.md, "Fragments"; the names g, column
// and row0 that all kernels use are explained there too.
#pragma once

#include "common.cuh"

constexpr int HALF_ROW = HEAD_DIM * 2;  // bytes of a row of 16-bit channels
constexpr int D_TILES = HEAD_DIM / 8;   // 8-column accumulator tiles of a row
// Not so on sm_86, 89 and 120, where by the data sheets tensor cores take 16 clocks for what an
// ldmatrix brings in 4.
constexpr bool FAST_MMA = SLA2_ARCH == 80 || SLA2_ARCH == 90 || SLA2_ARCH == 100;
constexpr int STATE = HEAD_DIM * (HEAD_DIM + 1);  // a linear state: h_j row by row, then z_j

// Byte offset of a 16-byte chunk. Eight rows at one chunk, which is what ldmatrix reads, fall into
// eight different 16-byte columns of the 128-byte bank line, whether a row holds 32, 64, 128 or 256
// bytes.
template <int ROW_BYTES>
SLA2_INLINE int tile_offset(int row, int chunk) {
    constexpr int CHUNKS = ROW_BYTES / 16;
    // Rows shorter than 128 bytes share a bank line and need no swizzle among themselves.
    constexpr int ROWS_PER_LINE = CHUNKS >= 8 ? 1 : 8 / CHUNKS;
    constexpr int MASK = (CHUNKS >= 8 ? 8 : CHUNKS) - 1;
    return row * ROW_BYTES + ((chunk ^ ((row / ROWS_PER_LINE) & MASK)) << 4);
}

// Whether a tile's copies take their address from the one before, which is fewer instructions; on
// sm_100 ptxas spills with it.
constexpr bool RUNNING_ADDRESS = SLA2_ARCH != 100;

// Starts the copy of ROWS rows; rows at or past valid_rows become zeros.
template <int ROWS, int ROW_BYTES, int THREADS>
SLA2_INLINE void load_tile(unsigned char* smem, const void* gmem, int stride_bytes,
                           int valid_rows) {
    constexpr int CHUNKS = ROW_BYTES / 16, ROWS_A_PASS = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0, "a pass loads whole rows");
    const int row0 = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const unsigned char* source = static_cast<const unsigned char*>(gmem) + 16 * chunk;
    if (RUNNING_ADDRESS) source += row0 * stride_bytes;
#pragma unroll
    for (int first = 0; first < ROWS; first += ROWS_A_PASS) {
        const int row = first + row0;
        if (ROWS % ROWS_A_PASS != 0 && row >= ROWS) break;
        // A copy of 0 valid bytes reads nothing, wherever its address points, and writes zeros.
        cp_async_16(smem + tile_offset<ROW_BYTES>(row, chunk),
                    RUNNING_ADDRESS ? source : source + row * stride_bytes,
                    row < valid_rows ? 16 : 0);
        if (RUNNING_ADDRESS) source += ROWS_A_PASS * stride_bytes;
    }
}

// Byte offset of the row that a lane names to ldmatrix: lane_row of the 16 or 32 rows from row0
// (a multiple of 8), and lane_chunk (0 or 1) after `chunk` (even). It equals
// tile_offset(row0 + lane_row, chunk + lane_chunk): row0 does not change the swizzle, and adding
// an even chunk is an XOR, which commutes with the swizzle's. So the part that depends on the lane
// is one register for a tile shape, and the rest folds into constants when loops are unrolled.
template <int ROW_BYTES>
SLA2_INLINE int lane_offset(int lane_row, int lane_chunk, int row0, int chunk) {
    return (tile_offset<ROW_BYTES>(lane_row, lane_chunk) ^ (chunk << 4)) + row0 * ROW_BYTES;
}

// A operand of rows row0 .. +15 and 32 bytes from `chunk` of a tile stored [m][k]. Lanes 0-15 name
// the rows at the left chunk, lanes 16-31 at the right one: the order of a[0] to a[3].
template <int ROW_BYTES>
SLA2_INLINE void load_a(unsigned (&a)[4], const unsigned char* tile, int row0, int chunk) {
    const int lane = threadIdx.x & 31;
    ldmatrix_x4(a, tile + lane_offset<ROW_BYTES>(lane & 15, lane >> 4, row0, chunk));
}

// A operand of rows m0 .. +15, depth k0 .. +15, of a 16-bit tile stored [k][m]. a[1] is the next
// eight m, which is the next chunk here, and a[2] the next eight k, which are the next rows.
template <int ROW_BYTES>
SLA2_INLINE void load_a_trans(unsigned (&a)[4], const unsigned char* tile, int k0, int m0) {
    const int lane = threadIdx.x & 31, row = (lane & 7) + ((lane >> 4) << 3);
    ldmatrix_x4_trans(a, tile + lane_offset<ROW_BYTES>(row, (lane >> 3) & 1, k0, m0 / 8));
}

// B operands of two 8-column tiles, columns n0 .. +15 and 32 bytes from `chunk`, of a tile stored
// [n][k]: b[0], b[1] belong to the first tile, b[2], b[3] to the second.
template <int ROW_BYTES>
SLA2_INLINE void load_b(unsigned (&b)[4], const unsigned char* tile, int n0, int chunk) {
    const int lane = threadIdx.x & 31, row = (lane & 7) + ((lane >> 4) << 3);
    ldmatrix_x4(b, tile + lane_offset<ROW_BYTES>(row, (lane >> 3) & 1, n0, chunk));
}

// The same for a 16-bit tile stored [k][n]: depth k0 .. +15, columns n0 .. +15.
template <int ROW_BYTES>
SLA2_INLINE void load_b_trans(unsigned (&b)[4], const unsigned char* tile, int k0, int n0) {
    const int lane = threadIdx.x & 31;
    ldmatrix_x4_trans(b, tile + lane_offset<ROW_BYTES>(lane & 15, lane >> 4, k0, n0 / 8));
}

// phi: rows row0 .. row0 + ROWS - 1 of a 16-bit tile become their softmax over the first `channels`
// channels, and 0 in the others. The warp's own rows, which it alone has read since the barrier
// before, and which it alone reads next.
template <int ROWS>
SLA2_INLINE void softmax_rows(unsigned char* tile, int row0, int channels) {
    constexpr int LANES = HEAD_DIM / 8, ROWS_A_PASS = 32 / LANES;  // a lane has 8 channels
    const int lane = threadIdx.x & 31, chunk = lane % LANES, inside = channels - 8 * chunk;
    __syncwarp();
#pragma unroll 2
    for (int row = row0 + lane / LANES; row < row0 + ROWS; row += ROWS_A_PASS) {
        uint4* at = reinterpret_cast<uint4*>(tile + tile_offset<HALF_ROW>(row, chunk));
        float x[8];
        unpack_chunk(x, *at);
        softmax_of_lanes(x, inside);
        *at = pack_chunk(x);
    }
    __syncwarp();
}

// Lane q of a quad gives word i for lane i and gets the word that lane i had for it.
SLA2_INLINE void quad_transpose(unsigned (&w)[4]) {
#pragma unroll
    for (int step = 1; step < 4; step <<= 1) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const unsigned got = shfl_xor(upper ? w[i] : w[i + step], step);
            w[i] = upper ? got : w[i], w[i + step] = upper ? w[i + step] : got;
        }
    }
}

// A warp's 16 accumulator rows of TILES tiles, times the factor of each lane's two rows, in 16 bit
// to rows 0 .. 15 of `target`, those below `rows`; rows lie `step` elements apart. Of four tiles,
// lane q gets the eight columns of tile q, so that it stores 16 bytes and a quad 64.
template <int TILES>
SLA2_INLINE void store_fragments(const float (&acc)[TILES][4], float factor0, float factor1,
                                 half_bits* target, long long step, int rows) {
    const int g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < TILES; n += 4)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float factor = r ? factor1 : factor0;
            unsigned w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                w[i] = pack_half(acc[n + i][2 * r] * factor, acc[n + i][2 * r + 1] * factor);
            quad_transpose(w);
            uint4 chunk;
            chunk.x = w[0], chunk.y = w[1], chunk.z = w[2], chunk.w = w[3];
            if (g + 8 * r < rows)
                *reinterpret_cast<uint4*>(target + (g + 8 * r) * step + 8 * (n + q)) = chunk;
        }
}

template <int TILES>
SLA2_INLINE void clear(float (&acc)[TILES][4]) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[n][e] = 0.0f;
}

// acc += A B^T for 16 rows of a 16-bit tile [m][d] from row0 and all 8 TILES rows of a tile [n][d].
template <int UNROLL = HEAD_DIM / 16, int TILES>
SLA2_INLINE void product_over_channels(float (&acc)[TILES][4], const unsigned char* left, int row0,
                                       const unsigned char* right) {
#pragma unroll UNROLL
    for (int c = 0; c < HEAD_DIM / 16; ++c) {
        unsigned a[4];
        load_a<HALF_ROW>(a, left, row0, 2 * c);
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
            unsigned b[4];
            load_b<HALF_ROW>(b, right, 8 * n, 2 * c);
            mma_half(acc[n], a, &b[0]);
            mma_half(acc[n + 1], a, &b[2]);
        }
    }
}
