// A block of tokens in registers, as the kernels before attention read Q, K and V: each once.
#pragma once

#include "formats.cuh"
#include "sm90/offsets.cuh"

constexpr int ROW_LANES = HEAD_DIM / 8;  // lanes of a row, 8 channels (16 bytes) each

// ROWS tokens among THREADS threads: pass p of a thread holds its 8 channels of row(p).
template <int ROWS, int THREADS>
struct Block {
    static constexpr int GROUPS = THREADS / ROW_LANES, PASSES = ROWS / GROUPS;
    static_assert(ROWS % GROUPS == 0, "every pass is whole");
    uint4 kept[PASSES];

    static __device__ __forceinline__ int row(int pass) {
        return pass * GROUPS + threadIdx.x / ROW_LANES;
    }

    // Rows step elements apart. All loads are under way before the first value is used; those of
    // rows at or past `rows`, which is at least 1, read the last row.
    __device__ __forceinline__ void load(const half_bits* x, int step, int rows) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
            kept[pass] = load_16(x + (row(pass) < rows ? row(pass) : rows - 1) * step +
                                 8 * (threadIdx.x % ROW_LANES));
    }

    // Rows at or past `valid` become zeros.
    __device__ __forceinline__ void cut(int valid) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
            if (row(pass) >= valid)
                kept[pass].x = kept[pass].y = kept[pass].z = kept[pass].w = 0u;
    }

    // The block as a tile that wgmma reads.
    __device__ __forceinline__ void store_tile(unsigned char* tile) const {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
            *reinterpret_cast<uint4*>(
                tile + panel_offset<ROWS>(row(pass), threadIdx.x % ROW_LANES)) = kept[pass];
    }

    // The block's scale in 8 bit. All threads call it; `tops` has a float a warp.
    __device__ __forceinline__ float scale(float* tops) const {
        float top = 0.0f;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            float x[8];
            unpack_chunk(x, kept[pass]);
#pragma unroll
            for (int e = 0; e < 8; ++e) top = max_nan(top, fabsf(x[e]));
        }
        top = warp_max_nan(top);
        if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
        __syncthreads();
        for (int w = 0; w < THREADS / 32; ++w) top = max_nan(top, tops[w]);
        return scale_of(top, QK_LIMIT);
    }

    // The block in 8 bit with one scale: bytes (ROWS, D), those of the first `rows` rows. All
    // threads call it; `tops` has a float a warp. The thread's 8 bytes of row(0) lie at `first`,
    // those of its other rows further by whole rows of D.
    __device__ __forceinline__ void store_bytes(float* tops, int rows, unsigned char* bytes,
                                                float* scale_out, int first) const {
        const float step = scale(tops);
        if (threadIdx.x == 0) *scale_out = step;
        const Divisor by(step);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
            if (row(pass) < rows)
                *reinterpret_cast<uint2*>(bytes + first + pass * GROUPS * HEAD_DIM) =
                    quantized_chunk(kept[pass], by);
    }
};
