// 8-bit K and V^T in the tiles that the low-bit forward on Hopper copies whole.
#include "sm90/panels.cuh"

// A tile of ROWS rows; those from `valid` on are zeros. 128 threads.
template <int ROWS, int ROW_BYTES>
SLA2_INLINE void pack_tile(const unsigned char* x, int valid, unsigned char* tile) {
    constexpr int CHUNKS = ROW_BYTES / 16;
#pragma unroll
    for (int first = 0; first < ROWS * CHUNKS; first += 128) {
        const int i = first + threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS;
        uint4 raw = *reinterpret_cast<const uint4*>(x + (row < valid ? 16 * i : 0));
        if (row >= valid) raw.x = raw.y = raw.z = raw.w = 0u;
        *reinterpret_cast<uint4*>(tile + byte_offset<ROW_BYTES>(row, chunk)) = raw;
    }
}

// Grid (T_n, B H, 2), 128 threads: tiles of K for z = 0, of V^T for z = 1. k_bytes (B H, n_k, D),
// zeros past kv_lengths; v_bytes (B H, T_n, D, BLOCK_K).
extern "C" __global__ void __launch_bounds__(128)
sla2_sm90_pack_low(const unsigned char* __restrict__ k_bytes,
                   const unsigned char* __restrict__ v_bytes, unsigned char* __restrict__ k_tiles,
                   unsigned char* __restrict__ v_tiles, int n_k) {
    constexpr int TILE_BYTES = BLOCK_K * HEAD_DIM;
    const long long bh = blockIdx.y, at = (bh * gridDim.x + blockIdx.x) * TILE_BYTES;
    const int first = blockIdx.x * BLOCK_K;
    if (blockIdx.z == 0)
        pack_tile<BLOCK_K, HEAD_DIM>(k_bytes + (bh * n_k + first) * HEAD_DIM, n_k - first,
                                     k_tiles + at);
    else
        pack_tile<HEAD_DIM, BLOCK_K>(v_bytes + at, HEAD_DIM, v_tiles + at);
}
