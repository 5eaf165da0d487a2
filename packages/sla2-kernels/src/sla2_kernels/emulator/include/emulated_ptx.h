// The functions of csrc/ptx.cuh on the CPU: copies that land only at their wait, ldmatrix,
// mma.sync, conversions, shuffles.
#pragma once
#include "cuda_names.h"

namespace sla2 {
// Plain stores of 16 bytes: ThreadSanitizer does not see those of memset and memcpy in this
// library.
inline void store_16(void* to, const uint64_t (&value)[2]) {
    static_cast<uint64_t*>(to)[0] = value[0];
    static_cast<uint64_t*>(to)[1] = value[1];
}
}  // namespace sla2

inline void cp_async_16(void* smem, const void* gmem, int valid_bytes,
                        sla2::Place p = sla2::Place::here()) {
    auto aligned = [](const void* x) { return (reinterpret_cast<uintptr_t>(x) & 15) == 0; };
    if (!aligned(smem))
        sla2::misuse("cp.async: shared address is not a multiple of 16", {"cp.async", p});
    if (valid_bytes > 0 && !aligned(gmem))
        sla2::misuse("cp.async: global address is not a multiple of 16", {"cp.async", p});
    if (valid_bytes < 0 || valid_bytes > 16)
        sla2::misuse("cp.async: valid bytes outside 0..16", {"cp.async", p});
    // NaN until the wait that covers the copy: reading too early shows.
    sla2::store_16(smem, {~uint64_t(0), ~uint64_t(0)});
    sla2::self().pending.push_back(
        {static_cast<unsigned char*>(smem), static_cast<const unsigned char*>(gmem), valid_bytes});
}
inline uint4 load_16(const void* gmem, sla2::Place p = sla2::Place::here()) {
    if (reinterpret_cast<uintptr_t>(gmem) & 15)
        sla2::misuse("a load of 16 bytes: address is not a multiple of 16", {"ld.global.v4", p});
    return *static_cast<const uint4*>(gmem);
}
inline void cp_async_commit() {
    sla2::Thread& t = sla2::self();
    t.groups.push_back(std::move(t.pending));
    t.pending.clear();
}
template <int N> void cp_async_wait() {
    sla2::Thread& t = sla2::self();
    while (t.groups.size() > size_t(N)) {
        for (const sla2::Copy& c : t.groups.front()) {
            uint64_t value[2] = {};
            std::memcpy(value, c.from, size_t(c.bytes));
            sla2::store_16(c.to, value);
        }
        t.groups.erase(t.groups.begin());
    }
}

namespace sla2 {
// Each lane reads the 16-byte row that it names, then the warp exchanges; lanes of unused matrices
// name none.
template <int COUNT, bool TRANSPOSED>
void ldmatrix(const char* name, unsigned* r, const void* row, Place place) {
    Operation operation = {name, place};
    unsigned char in[16] = {};
    if (self().lane < 8 * COUNT) {
        if (reinterpret_cast<uintptr_t>(row) & 15)
            misuse("ldmatrix: row address is not a multiple of 16", operation);
        std::memcpy(in, row, 16);
    }
    // Lane 4 g + q gets row g, elements 2 q and 2 q + 1 of every matrix (of its transpose).
    collective(operation, in, 16, r, 4 * COUNT, [](Warp& w) {
        for (int m = 0; m < COUNT; m++)
            for (int l = 0; l < 32; l++) {
                int g = l / 4, q = l % 4 * 2;
                if (TRANSPOSED) {
                    std::memcpy(w.out[l] + 4 * m, w.in[8 * m + q] + 2 * g, 2);
                    std::memcpy(w.out[l] + 4 * m + 2, w.in[8 * m + q + 1] + 2 * g, 2);
                } else {
                    std::memcpy(w.out[l] + 4 * m, w.in[8 * m + g] + 2 * q, 4);
                }
            }
    });
}

struct Operands { unsigned a[4], b[2]; unsigned c[4]; };

// C (16 x 8) += A (16 x K) B (K x 8), fragments as in the PTX manual; PER elements in a 32-bit
// register.
template <int K, int PER, class Element, class Sum, class Convert>
void mma(const char* name, Sum* c, const unsigned* a, const unsigned* b, Place place,
         Convert convert) {
    Operands in;
    std::memcpy(in.a, a, 16);
    std::memcpy(in.b, b, 8);
    std::memcpy(in.c, c, 16);
    collective({name, place}, &in, sizeof in, c, 16, [&](Warp& w) {
        Sum A[16][K], B[K][8], C[16][8];
        for (int l = 0; l < 32; l++) {
            const Operands& o = *reinterpret_cast<const Operands*>(w.in[l]);
            int g = l / 4, q = l % 4;
            const Element* x = reinterpret_cast<const Element*>(o.a);
            const Element* y = reinterpret_cast<const Element*>(o.b);
            for (int i = 0; i < 4; i++)
                for (int e = 0; e < PER; e++)
                    A[g + 8 * (i & 1)][q * PER + e + K / 2 * (i >> 1)] = convert(x[i * PER + e]);
            for (int i = 0; i < 2; i++)
                for (int e = 0; e < PER; e++)
                    B[q * PER + e + K / 2 * i][g] = convert(y[i * PER + e]);
            for (int i = 0; i < 4; i++)
                std::memcpy(&C[g + 8 * (i >> 1)][q * 2 + (i & 1)], &o.c[i], 4);
        }
        for (int i = 0; i < 16; i++) {
            Sum sum[8] = {};
            for (int k = 0; k < K; k++)
                for (int j = 0; j < 8; j++) sum[j] += A[i][k] * B[k][j];
            for (int j = 0; j < 8; j++) C[i][j] += sum[j];
        }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++)
                std::memcpy(w.out[l] + 4 * i, &C[l / 4 + 8 * (i >> 1)][l % 4 * 2 + (i & 1)], 4);
    });
}
}  // namespace sla2

inline void ldmatrix_x4(unsigned* r, const void* row, sla2::Place p = sla2::Place::here()) {
    sla2::ldmatrix<4, false>("ldmatrix", r, row, p);
}
inline void ldmatrix_x4_trans(unsigned* r, const void* row, sla2::Place p = sla2::Place::here()) {
    sla2::ldmatrix<4, true>("ldmatrix.trans", r, row, p);
}
inline void ldmatrix_x2(unsigned* r, const void* row, sla2::Place p = sla2::Place::here()) {
    sla2::ldmatrix<2, false>("ldmatrix", r, row, p);
}
inline void ldmatrix_x2_trans(unsigned* r, const void* row, sla2::Place p = sla2::Place::here()) {
    sla2::ldmatrix<2, true>("ldmatrix.trans", r, row, p);
}
inline void mma_m16n8k16_bf16(float* c, const unsigned* a, const unsigned* b,
                              sla2::Place p = sla2::Place::here()) {
    sla2::mma<16, 2, unsigned short>("mma bf16", c, a, b, p, bf16_to_f32);
}
inline void mma_m16n8k16_f16(float* c, const unsigned* a, const unsigned* b,
                             sla2::Place p = sla2::Place::here()) {
    sla2::mma<16, 2, unsigned short>("mma f16", c, a, b, p, f16_to_f32);
}
inline void mma_m16n8k32_s8(int* c, const unsigned* a, const unsigned* b,
                            sla2::Place p = sla2::Place::here()) {
    sla2::mma<32, 4, signed char>("mma s8", c, a, b, p, [](signed char x) { return int(x); });
}
inline void mma_m16n8k32_e4m3(float* c, const unsigned* a, const unsigned* b,
                              sla2::Place p = sla2::Place::here()) {
    sla2::mma<32, 4, unsigned char>("mma e4m3", c, a, b, p, e4m3_to_f32);
}

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float inverse_approx(float x) { return 1.0f / x; }
inline float max_nan(float a, float b) { return a > b || a != a ? a : b; }
inline float log2_approx(float x) { return std::log2(x); }
inline unsigned short cvt_e4m3x2(float low, float high) {
    return static_cast<unsigned short>(f32_to_e4m3(low) | f32_to_e4m3(high) << 8);
}
inline unsigned e4m3x2_to_f16x2(unsigned short x) {
    return f32_to_f16(e4m3_to_f32(static_cast<unsigned char>(x & 0xff))) |
           unsigned(f32_to_f16(e4m3_to_f32(static_cast<unsigned char>(x >> 8)))) << 16;
}
inline unsigned mul_f16x2(unsigned a, unsigned b) {
    auto half = [](unsigned x, int i) { return f16_to_f32(static_cast<unsigned short>(x >> i)); };
    return f32_to_f16(half(a, 0) * half(b, 0)) |
           unsigned(f32_to_f16(half(a, 16) * half(b, 16))) << 16;
}
inline unsigned byte_signs(unsigned x) { return (x >> 7 & 0x01010101u) * 0xffu; }
inline unsigned pack_bf16x2(float low, float high) {
    return f32_to_bf16(low) | unsigned(f32_to_bf16(high)) << 16;
}
inline unsigned pack_f16x2(float low, float high) {
    return f32_to_f16(low) | unsigned(f32_to_f16(high)) << 16;
}

template <class T>
T shfl_xor(T v, int mask, sla2::Place p = sla2::Place::here()) {
    return __shfl_xor_sync(~0u, v, mask, 32, p);
}
template <class T>
T shfl(T v, int lane, sla2::Place p = sla2::Place::here()) {
    return __shfl_sync(~0u, v, lane, 32, p);
}
template <class T>
T shfl_up(T v, int d, sla2::Place p = sla2::Place::here()) {
    return __shfl_up_sync(~0u, v, unsigned(d), 32, p);
}
template <class T> T shfl_down(T v, int d, sla2::Place p = sla2::Place::here()) {
    return __shfl_down_sync(~0u, v, unsigned(d), 32, p);
}
template <class T> T warp_sum(T v, sla2::Place p = sla2::Place::here()) {
    for (int m = 16; m; m >>= 1) v += shfl_xor(v, m, p);
    return v;
}
inline int warp_total(int x, sla2::Place p = sla2::Place::here()) { return warp_sum(x, p); }
template <class T> T warp_max(T v, sla2::Place p = sla2::Place::here()) {
    for (int m = 16; m; m >>= 1) v = max(v, shfl_xor(v, m, p));
    return v;
}
inline unsigned ballot(bool x, sla2::Place p = sla2::Place::here()) {
    return __ballot_sync(~0u, x, p);
}
