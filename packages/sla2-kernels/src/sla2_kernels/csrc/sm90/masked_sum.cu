// H = (1 - M) h on Hopper: the product of ../linear.cu's sla2_masked_sum by wgmma.
#include "sm90/masked_sum.cuh"

// The producer's part: cp.async, which swizzles on the way.
SLA2_INLINE void bring_states(const SumArguments& args, int steps, int row_tiles,
                              unsigned char* shared, Barriers& barriers) {
    const half_bits* x = static_cast<const half_bits*>(args.x);
    const int chunk = threadIdx.x % (COLUMNS / 8), line0 = threadIdx.x / (COLUMNS / 8);
    Turn<STAGES> turn, landed;
    int in_flight = 0;
    for (int number = blockIdx.x; number < args.tiles; number += gridDim.x) {
        const SumTile tile = tile_of(number, row_tiles);
        const half_bits* from = x + tile.bh * args.depth * WIDTH + tile.column0 + 8 * chunk;
        const bool inside = tile.column0 + 8 * chunk < WIDTH;
        for (int step = 0; step < steps; ++step, turn.next()) {
            unsigned char* stage = shared + turn.stage * STAGE_BYTES;
            mbarrier_wait(&barriers.empty[turn.stage], turn.parity ^ 1);
#pragma unroll
            for (int line = line0; line < DEPTH; line += 128 / (COLUMNS / 8)) {
                const int j = step * DEPTH + line;
                const bool valid = inside && j < args.depth;
                cp_async_16(stage + panel_offset<DEPTH>(line, chunk),
                            valid ? from + static_cast<long long>(j) * WIDTH : x, valid ? 16 : 0);
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
}

// As sla2_masked_sum.
extern "C" __global__ void __launch_bounds__(384, 1)
sla2_sm90_masked_sum(const unsigned* __restrict__ bits, const half_bits* __restrict__ x,
                     const float* __restrict__ row_scale, half_bits* __restrict__ matrix,
                     float* __restrict__ vector, int rows, int depth, int tiles) {
    SLA2_ALIGNED_SHARED(shared);
    sum_blocks({bits, x, nullptr, nullptr, row_scale, matrix, vector, rows, depth, tiles}, shared,
               bring_states);
}
