// H = (1 - M) h on Hopper of states in 8 bit: as ../linear_low.cu's sla2_masked_sum_low, but by
// wgmma on fp16, to which the producer widens them. (8-bit operands of wgmma would have to lie
// transposed in shared memory.)
#include "sm90/masked_sum.cuh"

// Where a thread stands in its block's steps. The tile is known anew where it changes alone: that
// takes two divisions.
struct Walk {
    int number, step;
    SumTile tile;
    __device__ __forceinline__ explicit Walk(int row_tiles)
        : number(blockIdx.x), step(0), tile(tile_of(number, row_tiles)) {}
    __device__ __forceinline__ void next(int steps, int row_tiles) {
        if (++step < steps) return;
        step = 0, number += gridDim.x;
        tile = tile_of(number, row_tiles);
    }
};

// The producer's part: a thread widens to fp16, times their weights, what it copied itself, so that
// it waits for no other. Eight neighbouring threads have four chunks of two lines, which in a panel
// meet no bank twice.
SLA2_INLINE void bring_states(const SumArguments& args, int steps, int row_tiles,
                              unsigned char* shared, Barriers& barriers) {
    constexpr int LINES = 16, PASSES = DEPTH / LINES;
    const int thread = threadIdx.x, chunk = (thread & 3) + (thread >> 3 & 1) * 4;
    const int line0 = (thread >> 2 & 1) + (thread >> 4) * 2;
    unsigned char* slots = shared + SLOTS_AT + 16 * thread;
    const unsigned char* x = static_cast<const unsigned char*>(args.x) + 16 * chunk;
    const int own_tiles = (args.tiles - 1 - static_cast<int>(blockIdx.x)) / gridDim.x + 1;
    const int stages = own_tiles * steps;
    Walk ahead(row_tiles), behind(row_tiles);
    Turn<SLOTS> filled, read;
    Turn<STAGES> turn;
    for (int i = 0; i < stages + LAG; ++i) {
        if (i < stages) {
            const unsigned char* from = x + ahead.tile.bh * args.depth * WIDTH + ahead.tile.column0;
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                const int j = ahead.step * DEPTH + line0 + pass * LINES;
                cp_async_16(slots + filled.stage * SLOT_BYTES + pass * (SLOT_BYTES / PASSES),
                            from + static_cast<long long>(j < args.depth ? j : 0) * WIDTH,
                            j < args.depth ? 16 : 0);
            }
            ahead.next(steps, row_tiles), filled.next();
        }
        cp_async_commit();
        if (i < LAG) continue;
        cp_async_wait<LAG>();
        // Weights of a line and of the one 16 further are neighbours.
        const unsigned char* weights =
            args.weights + behind.tile.bh * padded_weights(args.depth) + behind.step * DEPTH +
            weight_place(line0);
        unsigned char* stage = shared + turn.stage * STAGE_BYTES;
        mbarrier_wait(&barriers.empty[turn.stage], turn.parity ^ 1);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const unsigned weight = weights[pass / 2 * 32 + pass % 2] * 0x01000100u;
            const uint4 raw = *reinterpret_cast<const uint4*>(
                slots + read.stage * SLOT_BYTES + pass * (SLOT_BYTES / PASSES));
            const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                unsigned wide[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const unsigned pair = words[2 * half + e / 2] >> 16 * (e & 1) & 0xffffu;
                    wide[e] = mul_f16x2(e4m3x2_to_f16x2(static_cast<unsigned short>(pair)), weight);
                }
                uint4 packed;
                packed.x = wide[0], packed.y = wide[1], packed.z = wide[2], packed.w = wide[3];
                *reinterpret_cast<uint4*>(
                    stage + panel_offset<DEPTH>(line0 + pass * LINES, 2 * chunk + half)) = packed;
            }
        }
        fence_proxy_async();  // wgmma reads the stage
        mbarrier_arrive(&barriers.full[turn.stage]);
        behind.next(steps, row_tiles), read.next(), turn.next();
    }
}

// As sla2_masked_sum_low.
extern "C" __global__ void __launch_bounds__(384, 1)
sla2_sm90_masked_sum_low(const unsigned* __restrict__ bits, const unsigned char* __restrict__ x,
                         const unsigned char* __restrict__ weights,
                         const float* __restrict__ value_scale,
                         const float* __restrict__ row_scale, half_bits* __restrict__ matrix,
                         float* __restrict__ vector, int rows, int depth, int tiles) {
    SLA2_ALIGNED_SHARED(shared);
    sum_blocks({bits, x, weights, value_scale, row_scale, matrix, vector, rows, depth, tiles},
               shared, bring_states);
}
