// The CUDA names that the kernels use, for a C++ compiler: qualifiers, vector types, indices,
// barriers, shuffles, arithmetic.
#pragma once
#include "number_formats.h"
#include "scheduler.h"
#if defined(__SANITIZE_THREAD__)
#include "os_threads.h"
#else
#include "fibers.h"
#endif
#include <algorithm>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define __restrict__ __restrict
#define SLA2_DYNAMIC_SHARED(name) unsigned char* name = ::sla2::self().block->shared

#define threadIdx (::sla2::self().index)
#define blockIdx (::sla2::self().block->index)
#define blockDim (::sla2::self().block->size)
#define gridDim (::sla2::self().block->grid)
constexpr int warpSize = 32;

struct float2 { alignas(8) float x; float y; };
struct float3 { float x, y, z; };
struct float4 { alignas(16) float x; float y, z, w; };
struct int2 { alignas(8) int x; int y; };
struct int3 { int x, y, z; };
struct int4 { alignas(16) int x; int y, z, w; };
struct uint2 { alignas(8) unsigned x; unsigned y; };
struct uint4 { alignas(16) unsigned x; unsigned y, z, w; };
struct uchar4 { alignas(4) unsigned char x; unsigned char y, z, w; };
struct ushort2 { alignas(4) unsigned short x; unsigned short y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline void __syncthreads(sla2::Place p = sla2::Place::here()) {
    sla2::wait_for_block({"__syncthreads", p});
}
inline void __syncwarp(unsigned mask = ~0u, sla2::Place p = sla2::Place::here()) {
    if (mask != ~0u)
        sla2::misuse("__syncwarp with a partial mask, which is not emulated,", {"__syncwarp", p});
    sla2::wait_for_warp({"__syncwarp", p}, [] {});
}
inline int __syncthreads_count(int predicate, sla2::Place p = sla2::Place::here()) {
    sla2::Block& block = *sla2::self().block;
    sla2::wait_for_block({"__syncthreads_count", p});  // all have read the vote before this one
    __atomic_store_n(&block.vote, 0, __ATOMIC_RELAXED);
    sla2::wait_for_block({"__syncthreads_count", p});  // nobody adds before it is 0
    __atomic_fetch_add(&block.vote, predicate != 0, __ATOMIC_RELAXED);
    sla2::wait_for_block({"__syncthreads_count", p});
    return __atomic_load_n(&block.vote, __ATOMIC_RELAXED);
}
inline int __syncthreads_or(int predicate, sla2::Place p = sla2::Place::here()) {
    return __syncthreads_count(predicate, p) != 0;
}
inline int __syncthreads_and(int predicate, sla2::Place p = sla2::Place::here()) {
    return __syncthreads_count(predicate, p) == int(sla2::self().block->threads.size());
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

namespace sla2 {
// Every lane gives a value and the lane it wants to read; a lane outside the warp gives the own
// value back.
template <class T> T shuffle(const char* name, T value, int from, unsigned mask, Place place) {
    static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes");
    Operation operation = {name, place};
    if (mask != ~0u) misuse("a shuffle with a partial mask, which is not emulated,", operation);
    struct Deposit { T value; int from; } in = {value, from};
    T out;
    collective(operation, &in, sizeof in, &out, sizeof out, [](Warp& w) {
        for (int l = 0; l < w.lanes; l++) {
            Deposit mine, other;
            std::memcpy(&mine, w.in[l], sizeof mine);
            bool inside = mine.from >= 0 && mine.from < w.lanes;
            std::memcpy(&other, w.in[inside ? mine.from : l], sizeof other);
            std::memcpy(w.out[l], &other.value, sizeof(T));
        }
    });
    return out;
}
inline unsigned vote(const char* name, bool predicate, unsigned mask, Place place) {
    Operation operation = {name, place};
    if (mask != ~0u) misuse("a vote with a partial mask, which is not emulated,", operation);
    unsigned in = predicate, out;
    collective(operation, &in, 4, &out, 4, [](Warp& w) {
        unsigned bits = 0, bit;
        for (int l = 0; l < w.lanes; l++) std::memcpy(&bit, w.in[l], 4), bits |= bit << l;
        for (int l = 0; l < w.lanes; l++) std::memcpy(w.out[l], &bits, 4);
    });
    return out;
}
inline unsigned lanes_of_warp() {
    int n = self().warp->lanes;
    return n == 32 ? ~0u : (1u << n) - 1u;
}
// lane + sign * offset inside its segment, else -1.
inline int sub_lane(int lane, int offset, int width, int sign) {
    int target = lane + sign * offset;
    return target / width == lane / width && target >= 0 ? target : -1;
}
}  // namespace sla2

template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int width = 32, sla2::Place p = sla2::Place::here()) {
    int lane = sla2::self().lane, from = lane ^ x;
    return sla2::shuffle("__shfl_xor_sync", v, from / width > lane / width ? -1 : from, m, p);
}
template <class T>
T __shfl_sync(unsigned m, T v, int from, int width = 32, sla2::Place p = sla2::Place::here()) {
    return sla2::shuffle("__shfl_sync", v, sla2::self().lane / width * width + (from & (width - 1)),
                         m, p);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int width = 32, sla2::Place p = sla2::Place::here()) {
    return sla2::shuffle("__shfl_up_sync", v, sla2::sub_lane(sla2::self().lane, int(d), width, -1),
                         m, p);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int width = 32,
                   sla2::Place p = sla2::Place::here()) {
    return sla2::shuffle("__shfl_down_sync", v, sla2::sub_lane(sla2::self().lane, int(d), width, 1),
                         m, p);
}
inline unsigned __ballot_sync(unsigned m, int x, sla2::Place p = sla2::Place::here()) {
    return sla2::vote("__ballot_sync", x, m, p);
}
inline int __any_sync(unsigned m, int x, sla2::Place p = sla2::Place::here()) {
    return sla2::vote("__any_sync", x, m, p) != 0;
}
inline int __all_sync(unsigned m, int x, sla2::Place p = sla2::Place::here()) {
    return sla2::vote("__all_sync", x, m, p) == sla2::lanes_of_warp();
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1u) << (31 - i);
    return r;
}
// Byte i of the result is byte (selector >> 4 i & 7) of the eight of x, then y.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++)
        r |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return r;
}
template <class T> T __ldg(const T* p) { return *p; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return int(std::floor(x)); }
inline float __int2float_rn(int x) { return float(x); }
using std::isfinite;
using std::isinf;
using std::isnan;

template <class T> T atomicAdd(T* p, T v) {
    if constexpr (sizeof(T) == 4 && !std::is_integral_v<T>) {
        unsigned* bits = reinterpret_cast<unsigned*>(p);
        unsigned old = __atomic_load_n(bits, __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(bits, &old, __float_as_uint(__uint_as_float(old) + v),
                                            false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
        return __uint_as_float(old);
    } else {
        return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
    }
}
template <class T> T atomicMax(T* p, T v) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < v &&
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
template <class T> T atomicMin(T* p, T v) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (v < old &&
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
template <class T> T atomicOr(T* p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
