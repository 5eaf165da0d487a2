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

// Byte offset of chunk `chunk` of a row of ROW_BYTES, 32 to 128, under a swizzle as wide.
template <int ROW_BYTES>
SLA2_INLINE int byte_offset(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ row / (128 / ROW_BYTES) & (ROW_BYTES / 16 - 1)) << 4);
}
