// Tiles as bulk copies bring them and wgmma reads them: panels of 64 channels in 16 bit, rows of
// 128 bytes in which chunk c of row r lies at c XOR (r mod 8); descriptors of their parts.
#pragma once

#include "common.cuh"
#include "sm90/ptx_sm90.cuh"

static_assert(BLOCK_Q == 128 && BLOCK_K == 64, "two warpgroups of 64 rows; keys 64 at a time");

constexpr int HALF_ROW = HEAD_DIM * 2;        // bytes of a row of 16-bit channels
constexpr int HALF_CHUNKS = HALF_ROW / 16;
constexpr int KEY_BYTES = BLOCK_K * HALF_ROW;  // a K or V tile

// Byte offset of 16-byte chunk `chunk` of a row, in a tile of ROWS rows.
template <int ROWS>
SLA2_INLINE int panel_offset(int row, int chunk) {
    return chunk / 8 * (ROWS * 128) + row * 128 + ((chunk & 7 ^ row & 7) << 4);
}

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

#if SLA2_DTYPE == 0
#define wgmma_half wgmma_f16
#else
#define wgmma_half wgmma_bf16
#endif
