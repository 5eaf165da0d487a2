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

// The larger of two floats, NaN if either is (fmaxf would hide it).
SLA2_INLINE float max_nan(float a, float b) { return a > b || a != a ? a : b; }

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
