// Tiles as bulk copies bring them and wgmma reads them, by descriptors of their parts.
#pragma once

#include "tile.cuh"
#include "sm90/offsets.cuh"
#include "sm90/ptx_sm90.cuh"

static_assert(BLOCK_Q == 128 && BLOCK_K == 64, "two warpgroups of 64 rows; keys 64 at a time");

constexpr int HALF_CHUNKS = HALF_ROW / 16;
constexpr int KEY_BYTES = BLOCK_K * HALF_ROW;  // a K or V tile

// Channels 16 c .. 16 c + 15 of a tile [n][channel], as the B operand of a product over channels.
template <int ROWS>
SLA2_INLINE descriptor_bits channels_of(const unsigned char* tile, int c) {
    return matrix_descriptor<128>(tile + (c >> 2) * (ROWS * 128) + (c & 3) * 32, 16, 1024);
}

// Rows 16 c .. 16 c + 15 of a tile [k][channel], as the B operand of a product over rows.
template <int ROWS>
SLA2_INLINE descriptor_bits rows_of(const unsigned char* tile, int c) {
    return matrix_descriptor<128>(tile + c * 2048, ROWS * 128, 1024);
}

constexpr int STATE_THREADS = 96;  // warps 1 to 3 of the block, which copy H

// Brings H and Z of a query block by STATE_THREADS threads. H is stored row by row: cp.async
// swizzles it on the way.
SLA2_INLINE void bring_state(const half_bits* state, const float* norm, int number,
                             unsigned char* state_tile, unsigned char* norm_row,
                             unsigned long long* full) {
    const int thread = threadIdx.x - 32;
    state += static_cast<long long>(number) * HEAD_DIM * HEAD_DIM;
    norm += static_cast<long long>(number) * HEAD_DIM;
    for (int i = thread; i < HEAD_DIM * HALF_CHUNKS; i += STATE_THREADS)
        cp_async_16(state_tile + panel_offset<HEAD_DIM>(i / HALF_CHUNKS, i % HALF_CHUNKS),
                    state + 8 * i, 16);
    if (thread < HEAD_DIM / 4) cp_async_16(norm_row + 16 * thread, norm + 4 * thread, 16);
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();  // wgmma reads H
    mbarrier_arrive(full);
}

#if SLA2_DTYPE == 0
#define wgmma_half wgmma_f16
#define wgmma_half_shared wgmma_f16_shared
#else
#define wgmma_half wgmma_bf16
#define wgmma_half_shared wgmma_bf16_shared
#endif
