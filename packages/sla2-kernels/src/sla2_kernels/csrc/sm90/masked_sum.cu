// H = (1 - M) h on Hopper: the product of ../linear.cu's sla2_masked_sum by wgmma.
#include "sm90/pipeline.cuh"

constexpr int WIDTH = HEAD_DIM * (HEAD_DIM + 1);  // columns: h_j row by row, then z_j
constexpr int ROWS = 256, COLUMNS = 128, DEPTH = 64, STAGES = 8;
constexpr int STAGE_BYTES = DEPTH * COLUMNS * 2;
constexpr int LAG = 4;  // stages whose copies a thread of the producer has in flight
constexpr int TILES = COLUMNS / 8;
constexpr int BARRIERS_AT = STAGES * STAGE_BYTES;

struct Barriers {
    unsigned long long full[STAGES], empty[STAGES];
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

// As sla2_masked_sum. Grid: at most one block a multiprocessor, 384 threads; `tiles` of 256 rows
// and 128 columns. The producer warpgroup copies x by cp.async, which swizzles it on the way; each
// consumer warpgroup has twice 64 rows, whose products hide the other's expansion of bits.
extern "C" __global__ void __launch_bounds__(384, 1)
sla2_sm90_masked_sum(const unsigned* __restrict__ bits, const half_bits* __restrict__ x,
                     const float* __restrict__ row_scale, half_bits* __restrict__ matrix,
                     float* __restrict__ vector, int rows, int depth, int tiles) {
    SLA2_ALIGNED_SHARED(shared);
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + BARRIERS_AT);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int words = ceil_div(depth, 32), steps = ceil_div(depth, DEPTH);
    const int row_tiles = ceil_div(rows, ROWS);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i)
            mbarrier_init(&barriers.full[i], 128), mbarrier_init(&barriers.empty[i], 2);
        fence_proxy_async();
    }
    __syncthreads();

    if (warp < 4) {
        setmaxnreg_dec<40>();
        const int chunk = threadIdx.x % (COLUMNS / 8), line0 = threadIdx.x / (COLUMNS / 8);
        Turn<STAGES> turn, landed;
        int in_flight = 0;
        for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
            const SumTile tile = tile_of(number, row_tiles);
            const half_bits* from = x + tile.bh * depth * WIDTH + tile.column0 + 8 * chunk;
            const bool inside = tile.column0 + 8 * chunk < WIDTH;
            for (int step = 0; step < steps; ++step, turn.next()) {
                unsigned char* stage = shared + turn.stage * STAGE_BYTES;
                mbarrier_wait(&barriers.empty[turn.stage], turn.parity ^ 1);
#pragma unroll
                for (int line = line0; line < DEPTH; line += 128 / (COLUMNS / 8)) {
                    const int j = step * DEPTH + line;
                    const bool valid = inside && j < depth;
                    cp_async_16(stage + panel_offset<DEPTH>(line, chunk),
                                valid ? from + static_cast<long long>(j) * WIDTH : x,
                                valid ? 16 : 0);
                }
                cp_async_commit();
                if (++in_flight <= LAG) continue;
                cp_async_wait<LAG>();
                fence_proxy_async();  // wgmma reads the stage
                mbarrier_arrive(&barriers.full[landed.stage]);
                landed.next();
                --in_flight;
            }
        }
        cp_async_wait<0>();
        fence_proxy_async();
        for (; in_flight > 0; --in_flight, landed.next())
            mbarrier_arrive(&barriers.full[landed.stage]);
        return;
    }

    setmaxnreg_inc<232>();
    const bool lead = (threadIdx.x & 127) == 0;  // of the warpgroup
    const int g = lane >> 2, q = lane & 3;
    const int own_row = (warp - 4) / 4 * 128 + warp % 4 * 16;
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
        const SumTile tile = tile_of(number, row_tiles);
        const int row = tile.row0 + own_row + g;
        const unsigned* tile_bits = bits + tile.bh * rows * words;
        float acc[2][4 * TILES];
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i) acc[0][i] = acc[1][i] = 0.0f;
        unsigned word[2][2][2];
        load_words(word, tile_bits, row, rows, words, 0);
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
                        a[m][c][r] = (both & 0x10001u << bit) * (ONE_BITS >> bit);
                    }
            const unsigned char* stage = shared + turn.stage * STAGE_BYTES;
            mbarrier_wait(&barriers.full[turn.stage], turn.parity);
            wgmma_fence();
#pragma unroll
            for (int c = 0; c < DEPTH / 16; ++c)
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    wgmma_half<MN_MAJOR>(acc[m], a[m][c], rows_of<DEPTH>(stage, c), 1);
            wgmma_commit();
            load_words(word, tile_bits, row, rows, words, step + 1);  // zeros past the end
            wgmma_wait<0>();
            if (lead) mbarrier_arrive(&barriers.empty[turn.stage]);
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            float scale[2], sums[TILES][4];
            const int first = tile.row0 + own_row + 64 * m;
            const long long at = tile.bh * rows + first;
#pragma unroll
            for (int r = 0; r < 2; ++r)
                scale[r] = row_scale == nullptr || first + g + 8 * r >= rows
                               ? 1.0f
                               : row_scale[at + g + 8 * r];
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[n][e] = acc[m][4 * n + e];
            if (tile.column0 < HEAD_DIM * HEAD_DIM) {  // a tile holds matrices, or vectors
                store_fragments(sums, scale[0], scale[1],
                                matrix + at * HEAD_DIM * HEAD_DIM + tile.column0,
                                HEAD_DIM * HEAD_DIM, rows - first);
                continue;
            }
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int n = 0; n < HEAD_DIM / 8; ++n) {
                    if (first + g + 8 * r >= rows) continue;
                    float2 pair;
                    pair.x = sums[n][2 * r] * scale[r];
                    pair.y = sums[n][2 * r + 1] * scale[r];
                    float* to = vector + (at + g + 8 * r) * HEAD_DIM + 8 * n + 2 * q;
                    *reinterpret_cast<float2*>(to) = pair;
                }
        }
    }
}
