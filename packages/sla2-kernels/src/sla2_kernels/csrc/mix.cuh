// Epilogue of the sparse forward kernels: normalise O_s, O_l = phi(Q) H / (phi(Q) . Z), mix with
// alpha, store O and L.
#pragma once

#include "softmax.cuh"
#include "tile.cuh"

// 32 rows a warp halve the shared-memory reads of 16 bit, where tensor cores outrun them; 8 bit
// reads half as much. With 16 rows a block has 8 warps, which sm_86, 89 and 120 need: one block
// fits there. (kernels.py launches as many threads.)
constexpr int FWD_WARP_ROWS = SLA2_PRECISION == 0 && FAST_MMA && BLOCK_Q % 32 == 0 ? 32 : 16;
constexpr int FWD_M_TILES = FWD_WARP_ROWS / 16;
constexpr int FWD_THREADS = BLOCK_Q / FWD_WARP_ROWS * 32;

SLA2_INLINE void clear(float (&acc)[FWD_M_TILES][D_TILES][4]) {
#pragma unroll
    for (int m = 0; m < FWD_M_TILES; ++m) clear(acc[m]);
}

// What the epilogue reads and writes, already advanced to the block's (batch, head), as `out` is to
// mix_arguments; null pointers switch parts off.
struct MixArguments {
    const half_bits* q;  // (n_q, D), rows q_step apart
    int q_step;
    int channels;            // of D, those that a head has; the others are padding
    const half_bits* state;  // H of this row block (D, D): [channel of phi][channel of V], or null:
                             // no linear branch, O = O_s
    const float* norm;       // Z of this row block (D,)
    float alpha;
    const float* mean;      // (D,) that K was given with and L is to leave out, or null
    half_bits* out;         // (n_q, D), rows out_step apart
    int out_step;
    half_bits* out_sparse;  // (n_q, D) O_s for the backward, or null
    float* lse;             // (n_q,) natural log-sum-exp of the selected scores
};

SLA2_INLINE MixArguments mix_arguments(const half_bits* q, int q_step, int channels,
                                       const half_bits* state, const float* norm,
                                       const float* alpha, int alpha_at, const float* mean,
                                       half_bits* out,
                                       int out_step, half_bits* out_sparse, float* lse, int n_q) {
    const long long rows_at = static_cast<long long>(blockIdx.y) * n_q;
    const long long block_at = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x;
    MixArguments args;
    args.q = q, args.q_step = q_step, args.channels = channels;
    args.state = state == nullptr ? nullptr : state + block_at * HEAD_DIM * HEAD_DIM;
    args.norm = state == nullptr ? nullptr : norm + block_at * HEAD_DIM;
    args.alpha = state == nullptr ? 1.0f : alpha[alpha_at];
    args.mean = mean == nullptr ? nullptr : mean + blockIdx.y * HEAD_DIM;
    args.out = out;
    args.out_step = out_step;
    args.out_sparse = out_sparse == nullptr ? nullptr : out_sparse + rows_at * HEAD_DIM;
    args.lse = lse + rows_at;
    return args;
}

// sums[m][r] = the product of row row0 + 16 m + 8 r + g of a 16-bit tile with an fp32 vector (D,):
// by the A operand's own layout each lane adds its channels, and a quad has them all.
SLA2_INLINE void row_products(float (&sums)[FWD_M_TILES][2], const unsigned char* tile,
                              const float* vector, int row0) {
    const int column = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int m = 0; m < FWD_M_TILES; ++m) {
        sums[m][0] = sums[m][1] = 0.0f;
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 16; ++c) {
            unsigned a[4];
            load_a<HALF_ROW>(a, tile, row0 + 16 * m, 2 * c);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float* x = vector + 16 * c + 8 * (r >> 1) + column;
                sums[m][r & 1] += low_half(a[r]) * x[0] + high_half(a[r]) * x[1];
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) sums[m][r] = quad_sum(sums[m][r]);
    }
}

// o += share phi(Q) H / (phi(Q) . Z). The factor of each row goes into its A operand, so that the
// product adds to o as it stands and needs no accumulators of its own. Rows without a denominator
// add nothing.
SLA2_INLINE void add_linear(float (&o)[FWD_M_TILES][D_TILES][4], const unsigned char* phi_tile,
                            const unsigned char* state_tile, const float* norm, float share,
                            int row0) {
    float factor[FWD_M_TILES][2];
    row_products(factor, phi_tile, norm, row0);
#pragma unroll
    for (int m = 0; m < FWD_M_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            factor[m][r] = factor[m][r] == 0.0f ? 0.0f : share / factor[m][r];
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; ++c) {
        unsigned a[FWD_M_TILES][4];
#pragma unroll
        for (int m = 0; m < FWD_M_TILES; ++m) {
            load_a<HALF_ROW>(a[m], phi_tile, row0 + 16 * m, 2 * c);
#pragma unroll
            for (int r = 0; r < 4; ++r)
                a[m][r] = pack_half(low_half(a[m][r]) * factor[m][r & 1],
                                    high_half(a[m][r]) * factor[m][r & 1]);
        }
#pragma unroll
        for (int n = 0; n < D_TILES; n += 2) {
            unsigned b[4];
            load_b_trans<HALF_ROW>(b, state_tile, 16 * c, 8 * n);
#pragma unroll
            for (int m = 0; m < FWD_M_TILES; ++m) {
                mma_half(o[m][n], a[m], &b[0]);
                mma_half(o[m][n + 1], a[m], &b[2]);
            }
        }
    }
}

// o in 16 bit -> `tile` in shared memory (of this warp's rows only) -> 16-byte stores to `target`
// (rows, D), rows step apart.
SLA2_INLINE void store_rows(float (&o)[FWD_M_TILES][D_TILES][4], unsigned char* tile,
                            half_bits* target, int step, int row0, int rows) {
    constexpr int CHUNKS = HALF_ROW / 16;
    const int lane = threadIdx.x & 31, g = lane >> 2, column = (lane & 3) * 2;
    __syncwarp();  // the warp has read what it stored here before
#pragma unroll
    for (int m = 0; m < FWD_M_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < D_TILES; ++n)
                *reinterpret_cast<unsigned*>(
                    tile + tile_offset<HALF_ROW>(row0 + 16 * m + 8 * r + g, n) + 2 * column) =
                    pack_half(o[m][n][2 * r], o[m][n][2 * r + 1]);
    __syncwarp();
    for (int i = lane; i < FWD_WARP_ROWS * CHUNKS; i += 32) {
        const int row = row0 + i / CHUNKS, chunk = i % CHUNKS;
        if (row < rows)
            reinterpret_cast<uint4*>(target + row * step)[chunk] =
                *reinterpret_cast<const uint4*>(tile + tile_offset<HALF_ROW>(row, chunk));
    }
}

// Divides o by the row sums and stores L of the `rows` rows from `lse`, of scores less `shift`. No
// row has a key unless `some`: then o is 0 and L -inf. `log_unit`: the natural logarithm of the
// unit in which the sums count.
SLA2_INLINE void normalise(float (&o)[FWD_M_TILES][D_TILES][4],
                           OnlineSoftmax<FWD_M_TILES>& softmax,
                           const float (&shift)[FWD_M_TILES][2], float softmax_scale,
                           float log_unit, bool some, float* lse, int row0, int rows) {
    const int lane = threadIdx.x & 31, g = lane >> 2;
    softmax.finish();
#pragma unroll
    for (int m = 0; m < FWD_M_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float inverse = some ? 1.0f / softmax.sum[m][r] : 0.0f;
#pragma unroll
            for (int n = 0; n < D_TILES; ++n)
                o[m][n][2 * r] *= inverse, o[m][n][2 * r + 1] *= inverse;
            const int row = row0 + 16 * m + 8 * r + g;
            if (row < rows && (lane & 3) == 0)
                lse[row] = some ? (softmax.maximum[m][r] - shift[m][r]) * softmax_scale +
                                      logf(softmax.sum[m][r]) - log_unit
                                : MINUS_INFINITY;
        }
}

// Ends a row block. All threads call it after the main loop; `phi_tile` (BLOCK_Q x D halves), which
// holds the block's 16-bit Q if `q_loaded`, which a mean needs, and becomes phi(Q), and `scratch`
// ((D + BLOCK_Q) x D halves) are shared memory that no thread reads any more once the barrier below
// is passed, and no cp.async may be in flight. `log_unit` as in normalise(). `some` and `rest` say
// whether the row selects any block and whether any is left over.
SLA2_INLINE void mix_and_store(const MixArguments& args, float (&o)[FWD_M_TILES][D_TILES][4],
                               OnlineSoftmax<FWD_M_TILES>& softmax, float softmax_scale,
                               float log_unit, bool some, bool rest, int first_row, int n_q,
                               bool q_loaded, unsigned char* phi_tile, unsigned char* scratch) {
    const int row0 = threadIdx.x / 32 * FWD_WARP_ROWS;
    const int rows = n_q - first_row < BLOCK_Q ? n_q - first_row : BLOCK_Q;
    const long long first_at = static_cast<long long>(first_row) * HEAD_DIM;
    const bool linear = args.state != nullptr && rest;
    unsigned char* state_tile = scratch;
    unsigned char* out_tile = scratch + HEAD_DIM * HALF_ROW;
    float shift[FWD_M_TILES][2];  // of the row's scores by K's mean
    if (args.mean != nullptr && some) row_products(shift, phi_tile, args.mean, row0);
    else
#pragma unroll
        for (int m = 0; m < FWD_M_TILES; ++m) shift[m][0] = shift[m][1] = 0.0f;
    __syncthreads();  // Q and H overwrite what the main loop of other warps may still read
    if (linear) {
        if (!q_loaded)
            load_tile<BLOCK_Q, HALF_ROW, FWD_THREADS>(
                phi_tile, args.q + static_cast<long long>(first_row) * args.q_step,
                2 * args.q_step, rows);
        load_tile<HEAD_DIM, HALF_ROW, FWD_THREADS>(state_tile, args.state, HALF_ROW, HEAD_DIM);
        cp_async_commit();
    }
    normalise(o, softmax, shift, softmax_scale, log_unit, some, args.lse + first_row, row0, rows);
    if (args.out_sparse != nullptr)
        store_rows(o, out_tile, args.out_sparse + first_at, HEAD_DIM, row0, rows);
    if (linear) {
        const float weight = some ? args.alpha : 0.0f;
#pragma unroll
        for (int m = 0; m < FWD_M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < D_TILES; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[m][n][e] *= weight;
        cp_async_wait<0>();
        __syncthreads();
        softmax_rows<FWD_WARP_ROWS>(phi_tile, row0, args.channels);
        add_linear(o, phi_tile, state_tile, args.norm, 1.0f - weight, row0);
    }
    store_rows(o, out_tile, args.out + static_cast<long long>(first_row) * args.out_step,
               args.out_step, row0, rows);
}
