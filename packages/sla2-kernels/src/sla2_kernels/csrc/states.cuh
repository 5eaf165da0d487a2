// Linear states in 8 bit (README.md, "States in 8 bit"): what keys_low.cu writes and the masked
// sums of low bit read, from sm_89 on.
#pragma once

#include "formats.cuh"

// Whether mma.sync multiplies E4M3 in one instruction; elsewhere the states are widened to fp16.
constexpr bool FP8_MMA = SLA2_ARCH == 89 || SLA2_ARCH == 120;

// Bytes of a block's states: h_j / BLOCK_K row by row, over the scales of V's channels and the
// weight; then, for each channel, z_j / BLOCK_K over the weight and times NORM_UNIT as a first and
// a second value, the second NORM_STEP times as fine.
constexpr int STATE_BYTES = HEAD_DIM * (HEAD_DIM + 2);
constexpr float NORM_UNIT = 256.0f, NORM_STEP = 16.0f;

// A block's weight is 2^n, n from -13 to 0, the least that is no smaller than each z_j / BLOCK_K.
// As a byte it is E4M3, of 2^8 times as much, for FP8_MMA, and else the upper byte of an fp16.
constexpr int LEAST_WEIGHT = -13, WEIGHT_SHIFT = FP8_MMA ? 3 : 2;
constexpr float WEIGHT_UNIT = FP8_MMA ? 0x1p-8f : 1.0f;

// n for the largest of z_j / BLOCK_K, which is at most 1. (A NaN is in z_j itself.)
SLA2_INLINE int weight_exponent(float top) {
    const int n = static_cast<int>((__float_as_uint(top) + 0x7fffffu) >> 23) - 127;
    return clamp_int(n, LEAST_WEIGHT, 0);
}

// 2^n of an exponent from -126 to 127.
SLA2_INLINE float power_of_two(int n) { return __int_as_float(n + 127 << 23); }

SLA2_INLINE unsigned char weight_byte(int n) {
    return static_cast<unsigned char>(n + 15 << WEIGHT_SHIFT);
}

// Weights lie in groups of 32 blocks, in the order in which a lane of a quad wants them: of lane q
// the blocks 2 q, 2 q + 16, 2 q + 1, 2 q + 17 and those 8 further, which are the bits q + 8 i and
// q + 4 + 8 i of a word of the map (bit_of). Groups come in pairs; what no block fills is 0.
SLA2_INLINE int weight_place(int block) {
    return (block & ~31) + (block >> 1 & 3) * 8 + (block >> 3 & 1) * 4 + (block & 1) * 2 +
           (block >> 4 & 1);
}
SLA2_INLINE int padded_weights(int blocks) { return ceil_div(blocks, 64) * 64; }
