// Where the 16-byte chunks of a row lie in the tiles that wgmma reads; on every architecture,
// because keys.cu writes such tiles.
#pragma once

#include "common.cuh"

// Byte offset of chunk `chunk` of a row of 16-bit channels, in a tile of ROWS rows: panels of 64
// channels, rows of 128 bytes in which chunk c of row r lies at c XOR (r mod 8).
template <int ROWS>
SLA2_INLINE int panel_offset(int row, int chunk) {
    return chunk / 8 * (ROWS * 128) + row * 128 + ((chunk & 7 ^ row & 7) << 4);
}

// Channel c of the pooled key of block `block`, in tiles (B H, ceil(T_n / BLOCK_K), BLOCK_K x D).
SLA2_INLINE half_bits* pooled_place(unsigned char* tiles, long long bh, int t_n, int block,
                                    int c) {
    const long long tile = bh * ceil_div(t_n, BLOCK_K) + block / BLOCK_K;
    return reinterpret_cast<half_bits*>(tiles + tile * (BLOCK_K * HEAD_DIM * 2) +
                                        panel_offset<BLOCK_K>(block % BLOCK_K, c / 8)) +
           c % 8;
}

// Byte offset of chunk `chunk` of a row of ROW_BYTES, 32 to 128, under a swizzle as wide.
template <int ROW_BYTES>
SLA2_INLINE int byte_offset(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ row / (128 / ROW_BYTES) & (ROW_BYTES / 16 - 1)) << 4);
}
