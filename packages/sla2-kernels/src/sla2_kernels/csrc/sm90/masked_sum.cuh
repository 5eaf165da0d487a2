// What both masked sums on Hopper share, of 16 bit and, compiled for a low precision, of states in
// 8 bit: the products by wgmma, and where their sums go.
#pragma once

#include "sm90/pipeline.cuh"
#include "states.cuh"

constexpr int WIDTH = LOW_BIT ? STATE_BYTES : STATE;  // columns of x
constexpr int ROWS = 256, COLUMNS = 128, DEPTH = 64, STAGES = LOW_BIT ? 4 : 8;
constexpr int STAGE_BYTES = DEPTH * COLUMNS * 2;
constexpr int LAG = LOW_BIT ? 7 : 4;  // stages whose copies a thread of the producer has in flight
constexpr int TILES = COLUMNS / 8;
// Low bit: where copies land before they are widened into a stage.
constexpr int SLOTS = LAG + 1, SLOT_BYTES = DEPTH * COLUMNS, SLOTS_AT = STAGES * STAGE_BYTES;
constexpr int BARRIERS_AT = SLOTS_AT + (LOW_BIT ? SLOTS * SLOT_BYTES : 0);

#if SLA2_PRECISION == 0
constexpr unsigned ONE = ONE_BITS;
#define wgmma_sum wgmma_half
#else
constexpr unsigned ONE = 0x3c00u;  // states become fp16, whatever type Q, K and V have
#define wgmma_sum wgmma_f16
#endif

struct Barriers {
    unsigned long long full[STAGES], empty[STAGES];
};

// As sla2_masked_sum has them, or sla2_masked_sum_low; `tiles` of 256 rows and 128 columns.
struct SumArguments {
    const unsigned* bits;
    const void* x;
    const unsigned char* weights;  // low bit alone
    const float* value_scale;      // low bit alone
    const float* row_scale;
    half_bits* matrix;
    float* vector;
    int rows, depth, tiles;
};

// Whose sums a tile holds: rows fastest, so that blocks of threads that run at the same time share
// columns of x in L2.
struct SumTile {
    int row0, column0;
    long long bh;
};

SLA2_INLINE SumTile tile_of(int number, int row_tiles) {
    constexpr int COLUMN_TILES = (WIDTH + COLUMNS - 1) / COLUMNS;
    const int rest = number / row_tiles;
    return {number % row_tiles * ROWS, rest % COLUMN_TILES * COLUMNS, rest / COLUMN_TILES};
}

// The words of a step for row row0 + g + 8 r of each 16 rows that the warp has, inverted: 1 - M.
// Bits past `depth` become ones, but their x is zero.
SLA2_INLINE void load_words(unsigned (&word)[2][2][2], const unsigned* bits, int row, int rows,
                            int words, int step) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int line = row + 64 * m + 8 * r, at = 2 * step + half;
                word[m][r][half] = line < rows && at < words
                                       ? ~bits[static_cast<long long>(line) * words + at]
                                       : 0u;
            }
}

// The sums of one m64 product of a tile, rows from `first` on; those of a matrix are times the
// scales of V's channels already.
SLA2_INLINE void store_sums(const SumArguments& args, const SumTile& tile, int first,
                            const float (&acc)[4 * TILES]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const long long at = tile.bh * args.rows + first;
    float scale[2], sums[TILES][4];
#pragma unroll
    for (int r = 0; r < 2; ++r)
        scale[r] = args.row_scale == nullptr || first + g + 8 * r >= args.rows
                       ? 1.0f
                       : args.row_scale[at + g + 8 * r];
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[n][e] = acc[4 * n + e];
    if (tile.column0 < HEAD_DIM * HEAD_DIM) {  // a tile holds matrices, or vectors
        store_fragments(sums, scale[0], scale[1],
                        args.matrix + at * HEAD_DIM * HEAD_DIM + tile.column0,
                        HEAD_DIM * HEAD_DIM, args.rows - first);
        return;
    }
    float* vector = args.vector + at * HEAD_DIM;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (first + g + 8 * r >= args.rows) continue;
        float* row = vector + (g + 8 * r) * HEAD_DIM;
        if (LOW_BIT) {
            const int channel = (tile.column0 - HEAD_DIM * HEAD_DIM) / 2 + q;
#pragma unroll
            for (int n = 0; n < TILES; ++n)
                row[channel + 4 * n] = (sums[n][2 * r] + sums[n][2 * r + 1] / NORM_STEP) *
                                       (scale[r] / NORM_UNIT);
            continue;
        }
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) {
            float2 pair;
            pair.x = sums[n][2 * r] * scale[r];
            pair.y = sums[n][2 * r + 1] * scale[r];
            *reinterpret_cast<float2*>(row + 8 * n + 2 * q) = pair;
        }
    }
}

// Grid: at most one block a multiprocessor, 384 threads. The producer warpgroup brings x into the
// stages by bring(args, steps, row_tiles, shared, barriers); each consumer warpgroup has twice 64
// rows, whose products hide the other's expansion of bits.
template <class Bring>
SLA2_INLINE void sum_blocks(const SumArguments& args, unsigned char* shared, Bring bring) {
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + BARRIERS_AT);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int words = ceil_div(args.depth, 32), steps = ceil_div(args.depth, DEPTH);
    const int row_tiles = ceil_div(args.rows, ROWS);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i)
            mbarrier_init(&barriers.full[i], 128), mbarrier_init(&barriers.empty[i], 2);
        fence_proxy_async();
    }
    __syncthreads();

    if (warp < 4) {
        setmaxnreg_dec<40>();
        bring(args, steps, row_tiles, shared, barriers);
        return;
    }

    setmaxnreg_inc<232>();
    const bool lead = (threadIdx.x & 127) == 0;  // of the warpgroup
    const int g = lane >> 2, q = lane & 3;
    const int own_row = (warp - 4) / 4 * 128 + warp % 4 * 16;
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < args.tiles; number += gridDim.x) {
        const SumTile tile = tile_of(number, row_tiles);
        const int row = tile.row0 + own_row + g;
        const unsigned* tile_bits = args.bits + tile.bh * args.rows * words;
        float acc[2][4 * TILES];
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i) acc[0][i] = acc[1][i] = 0.0f;
        unsigned word[2][2][2];
        load_words(word, tile_bits, row, args.rows, words, 0);
        for (int step = 0; step < steps; ++step, turn.next()) {
            // Register r of the A operand: row g + 8 (r & 1), depths 2 q and 2 q + 1 of the left
            // (r < 2) or right eight, of which each bit becomes a 16-bit 0 or 1 by one AND and one
            // multiplication (../linear.cu).
            unsigned a[2][DEPTH / 16][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int c = 0; c < DEPTH / 16; ++c)
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int bit = 4 * (r >> 1);
                        const unsigned both = word[m][r & 1][c >> 1] >> q >> 8 * (c & 1);
                        a[m][c][r] = (both & 0x10001u << bit) * (ONE >> bit);
                    }
            const unsigned char* stage = shared + turn.stage * STAGE_BYTES;
            mbarrier_wait(&barriers.full[turn.stage], turn.parity);
            wgmma_fence();
#pragma unroll
            for (int c = 0; c < DEPTH / 16; ++c)
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    wgmma_sum<MN_MAJOR>(acc[m], a[m][c], rows_of<DEPTH>(stage, c), 1);
            wgmma_commit();
            load_words(word, tile_bits, row, args.rows, words, step + 1);  // zeros past the end
            wgmma_wait<0>();
            if (lead) mbarrier_arrive(&barriers.empty[turn.stage]);
        }
        if (LOW_BIT && tile.column0 < HEAD_DIM * HEAD_DIM)
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const float2 by = *reinterpret_cast<const float2*>(
                    args.value_scale + tile.bh * HEAD_DIM + (8 * n + 2 * q) % HEAD_DIM);
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int e = 0; e < 4; ++e) acc[m][4 * n + e] *= e % 2 == 0 ? by.x : by.y;
            }
#pragma unroll
        for (int m = 0; m < 2; ++m) store_sums(args, tile, tile.row0 + own_row + 64 * m, acc[m]);
    }
}
