// What every kernel shares: compile-time geometry, the 16-bit type of the spec, small helpers.
#pragma once

#include "ptx.cuh"

#ifndef SLA2_BLOCK_Q
#define SLA2_BLOCK_Q 128
#endif
#ifndef SLA2_BLOCK_K
#define SLA2_BLOCK_K 64
#endif
#ifndef SLA2_PRECISION
#define SLA2_PRECISION 0
#endif

#define SLA2_INLINE static __device__ __forceinline__

typedef unsigned short half_bits;  // fp16 (SLA2_DTYPE 0) or bf16 (1), as its bits

constexpr int HEAD_DIM = SLA2_HEAD_DIM;
constexpr int BLOCK_Q = SLA2_BLOCK_Q;
constexpr int BLOCK_K = SLA2_BLOCK_K;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
#define MINUS_INFINITY __int_as_float(0xff800000)  // NVRTC has no constant for it

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head dimension");
static_assert(BLOCK_Q % 16 == 0 && BLOCK_K % 16 == 0, "blocks are whole 16-row tiles");

#if SLA2_DTYPE == 0
constexpr unsigned ONE_BITS = 0x3c00u;
SLA2_INLINE unsigned pack_half(float low, float high) { return pack_f16x2(low, high); }
SLA2_INLINE float half_to_float(half_bits x) { return f16_to_f32(x); }
SLA2_INLINE void mma_half(float* c, const unsigned* a, const unsigned* b) {
    mma_m16n8k16_f16(c, a, b);
}
#else
constexpr unsigned ONE_BITS = 0x3f80u;
SLA2_INLINE unsigned pack_half(float low, float high) { return pack_bf16x2(low, high); }
SLA2_INLINE float half_to_float(half_bits x) { return bf16_to_f32(x); }
SLA2_INLINE void mma_half(float* c, const unsigned* a, const unsigned* b) {
    mma_m16n8k16_bf16(c, a, b);
}
#endif

SLA2_INLINE half_bits float_to_half(float x) {
    return static_cast<half_bits>(pack_half(x, 0.0f) & 0xffffu);
}

SLA2_INLINE float low_half(unsigned x) {
    return half_to_float(static_cast<half_bits>(x & 0xffffu));
}

SLA2_INLINE float high_half(unsigned x) { return half_to_float(static_cast<half_bits>(x >> 16)); }

// Eight 16-bit values, as a 16-byte access moves them.
SLA2_INLINE void unpack_chunk(float (&x)[8], const uint4& raw) {
    x[0] = low_half(raw.x), x[1] = high_half(raw.x);
    x[2] = low_half(raw.y), x[3] = high_half(raw.y);
    x[4] = low_half(raw.z), x[5] = high_half(raw.z);
    x[6] = low_half(raw.w), x[7] = high_half(raw.w);
}

SLA2_INLINE uint4 pack_chunk(const float (&x)[8]) {
    uint4 raw;
    raw.x = pack_half(x[0], x[1]), raw.y = pack_half(x[2], x[3]);
    raw.z = pack_half(x[4], x[5]), raw.w = pack_half(x[6], x[7]);
    return raw;
}

SLA2_INLINE float warp_max_nan(float v) {
    for (int mask = 16; mask > 0; mask >>= 1) v = max_nan(v, shfl_xor(v, mask));
    return v;
}

SLA2_INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

SLA2_INLINE int clamp_int(int x, int low, int high) {
    return x < low ? low : (x > high ? high : x);
}

// Valid keys of batch item `item`: kv_lengths may be null.
SLA2_INLINE int valid_keys(const int* kv_lengths, int item, int n_k) {
    return kv_lengths == nullptr ? n_k : kv_lengths[item];
}

// How many of a row's key blocks, whose indices ascend, hold a key that counts.
SLA2_INLINE int blocks_with_keys(const int* list, int count, int length) {
    while (count > 0 && list[count - 1] * BLOCK_K >= length) --count;
    return count;
}

// Weight w of O_s in a query block, dO_s = w dO: 1 without a complement (or without a linear
// branch), 0 if nothing is selected.
SLA2_INLINE float sparse_weight(const float* alpha, long long alpha_at, const float* rest_inverse,
                                long long block, bool some) {
    if (rest_inverse == nullptr || rest_inverse[block] == 0.0f) return 1.0f;
    return some ? alpha[alpha_at] : 0.0f;
}

// Sum and maximum over the four lanes that share a row of an mma accumulator (README.md,
// "Fragments").
SLA2_INLINE float quad_sum(float v) {
    v += shfl_xor(v, 1);
    return v + shfl_xor(v, 2);
}

SLA2_INLINE float quad_max(float v) {
    v = fmaxf(v, shfl_xor(v, 1));
    return fmaxf(v, shfl_xor(v, 2));
}

// The softmax over the channels of a row that D / 8 neighbouring lanes share, 8 channels each, of
// which the lane has `inside` (any number from 8 on: all); the others become 0.
SLA2_INLINE void softmax_of_lanes(float (&x)[8], int inside) {
    if (inside < 8)
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = e < inside ? x[e] : MINUS_INFINITY;
    float largest = x[0], below = 0.0f;
#pragma unroll
    for (int e = 1; e < 8; ++e) largest = fmaxf(largest, x[e]);
#pragma unroll
    for (int mask = 1; mask < HEAD_DIM / 8; mask <<= 1)
        largest = fmaxf(largest, shfl_xor(largest, mask));
    largest *= LOG2_E;
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = exp2_approx(x[e] * LOG2_E - largest), below += x[e];
#pragma unroll
    for (int mask = 1; mask < HEAD_DIM / 8; mask <<= 1) below += shfl_xor(below, mask);
    const float inverse = inverse_approx(below);  // of 1 to D
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] *= inverse;
}

// A block map is kept as bits, 32 columns a word. Column 2 i of a word is bit i and column 2 i + 1
// bit 16 + i: so lie the two columns that a register of an MMA's A operand takes, each in its half
// of the register (linear.cu). bit_of is a column's bit, column_of a bit's column.
SLA2_INLINE int bit_of(int column) { return (column >> 1) + ((column & 1) << 4); }
SLA2_INLINE int column_of(int bit) { return ((bit & 15) << 1) + (bit >> 4); }

// The word of a set of 32 columns, column i in bit i of the set: bit_of(i) of the word is bit i.
SLA2_INLINE unsigned word_of(unsigned columns) {
    auto evens = [](unsigned x) {  // bit 2 i to bit i
        x &= 0x55555555u;
        x = (x | x >> 1) & 0x33333333u;
        x = (x | x >> 2) & 0x0f0f0f0fu;
        x = (x | x >> 4) & 0x00ff00ffu;
        return (x | x >> 8) & 0xffffu;
    };
    return evens(columns) | evens(columns >> 1) << 16;
}
