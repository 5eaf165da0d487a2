// K and V in the tiles that the sparse forward on Hopper copies whole.
#include "sm90/panels.cuh"

// One tile (BLOCK_K x D) of x - mean, mean null for 0, rounded to 16 bit; rows from `valid` on are
// zeros. 128 threads.
SLA2_INLINE void pack_tile(const half_bits* x, int x_step, const float* mean, int valid,
                           unsigned char* tile) {
    const int chunk = threadIdx.x % HALF_CHUNKS;
    float shift[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) shift[e] = mean == nullptr ? 0.0f : mean[8 * chunk + e];
    constexpr int ROWS_A_PASS = 128 / HALF_CHUNKS;
#pragma unroll
    for (int first = 0; first < BLOCK_K; first += ROWS_A_PASS) {
        const int row = first + threadIdx.x / HALF_CHUNKS;
        // Loaded from a row that is there, so that all loads are in flight at once.
        uint4 raw = *reinterpret_cast<const uint4*>(x + (row < valid ? row * x_step : 0) +
                                                    8 * chunk);
        if (mean != nullptr) {
            raw.x = pack_half(low_half(raw.x) - shift[0], high_half(raw.x) - shift[1]);
            raw.y = pack_half(low_half(raw.y) - shift[2], high_half(raw.y) - shift[3]);
            raw.z = pack_half(low_half(raw.z) - shift[4], high_half(raw.z) - shift[5]);
            raw.w = pack_half(low_half(raw.w) - shift[6], high_half(raw.w) - shift[7]);
        }
        if (row >= valid) raw.x = raw.y = raw.z = raw.w = 0u;
        *reinterpret_cast<uint4*>(tile + panel_offset<BLOCK_K>(row, chunk)) = raw;
    }
}

// Grid (T_n, B H, 2), 128 threads: tiles of K for z = 0, of V for z = 1. k and v may lie in any
// layout with adjacent channels (strides: item, head, token); mean (B H, D) of K, or null; tiles
// (B H, T_n, BLOCK_K x D) in 16 bit.
extern "C" __global__ void __launch_bounds__(128)
sla2_sm90_pack(const half_bits* __restrict__ k, long long k_item, long long k_head, int k_step,
               const half_bits* __restrict__ v, long long v_item, long long v_head, int v_step,
               const float* __restrict__ mean, const int* __restrict__ kv_lengths,
               unsigned char* __restrict__ k_tiles, unsigned char* __restrict__ v_tiles,
               int num_heads, int n_k) {
    const long long bh = blockIdx.y, at = bh * gridDim.x + blockIdx.x;
    const int item = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const int first = blockIdx.x * BLOCK_K;
    const int valid = valid_keys(kv_lengths, item, n_k) - first;
    const long long step = blockIdx.z == 0 ? k_step : v_step;
    k += item * k_item + head * k_head + first * step;
    v += item * v_item + head * v_head + first * step;
    if (blockIdx.z == 0)
        pack_tile(k, k_step, mean == nullptr ? nullptr : mean + bh * HEAD_DIM, valid,
                  k_tiles + at * KEY_BYTES);
    else
        pack_tile(v, v_step, nullptr, valid, v_tiles + at * KEY_BYTES);
}
