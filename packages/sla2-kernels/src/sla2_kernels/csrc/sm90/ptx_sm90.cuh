// Every inline PTX instruction that only sm_90a has, each as one small function: mbarriers, bulk
// copies, products of warpgroups, roles of warps. The emulator supplies the same functions.
#pragma once

#include "ptx.cuh"

constexpr int K_MAJOR = 0, MN_MAJOR = 1;  // which axis of a tile in shared memory is contiguous
typedef unsigned long long descriptor_bits;  // a matrix descriptor

#ifdef SLA2_EMULATOR
#include "emulated_sm90.h"
#else

// The block's dynamic shared memory, where swizzled tiles lie: their patterns repeat in 1024 bytes.
#define SLA2_ALIGNED_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// An mbarrier whose phases end with `count` arrivals and all bytes that they expect.
SLA2_PTX void mbarrier_init(unsigned long long* at, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count)
                 : "memory");
}

SLA2_PTX void mbarrier_arrive(unsigned long long* at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}

// Arrives, and lets the phase expect so many bytes of bulk copies.
SLA2_PTX void mbarrier_arrive_expect(unsigned long long* at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)),
                 "r"(bytes)
                 : "memory");
}

// Waits for the end of the phase of this parity; parity 1 of a new barrier has ended.
SLA2_PTX void mbarrier_wait(unsigned long long* at, unsigned parity) {
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
        "@!done bra again; }" ::"r"(shared_address(at)),
        "r"(parity)
        : "memory");
}

// Makes the thread's writes to shared memory, mbarriers included, visible to bulk copies and wgmma.
SLA2_PTX void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies bytes, a multiple of 16, from global to shared memory; they complete on the mbarrier.
SLA2_PTX void bulk_load(void* smem, const void* gmem, int bytes, unsigned long long* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(smem)),
        "l"(gmem), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// True in one lane of the warp, always the same.
SLA2_PTX bool elect_one() {
    unsigned elected;
    asm volatile(
        "{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected != 0;
}

// Barriers 1 to 15, of `threads` threads that wait there or arrive.
SLA2_PTX void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

SLA2_PTX void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A warpgroup gives registers back, or takes more once others have.
template <int REGISTERS>
SLA2_PTX void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
SLA2_PTX void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// What is to be written to these registers is written before the instructions that follow: else the
// compiler may do it between the fence and the products that read them.
template <int WORDS>
SLA2_PTX void settle(float (&x)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

template <class Word, int WORDS>
SLA2_PTX void settle(Word (&x)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// Orders what the warpgroup wrote to its registers before the products that follow.
SLA2_PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

SLA2_PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most LEFT of the warpgroup's groups of products are in flight.
template <int LEFT>
SLA2_PTX void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// 2^x to about 2 ulp, 0 below 2^-126: one instruction, where subnormals would take three.
SLA2_PTX float exp2_flushed(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// A tile in shared memory whose rows of SWIZZLE bytes (0: of 16) are swizzled. K major: `stride`
// bytes lie between groups of 8 rows. MN major: `stride` between groups of 8 along the depth,
// `leading` between groups of SWIZZLE bytes along M or N.
template <int SWIZZLE>
SLA2_PTX descriptor_bits matrix_descriptor(const void* at, int leading, int stride) {
    constexpr descriptor_bits MODE = SWIZZLE == 0 ? 0 : SWIZZLE == 32 ? 3 : SWIZZLE == 64 ? 2 : 1;
    return (shared_address(at) & 0x3ffffu) >> 4 | static_cast<descriptor_bits>(leading >> 4) << 16 |
           static_cast<descriptor_bits>(stride >> 4) << 32 | MODE << 62;
}

// d (64 x 2 WORDS) = a b, plus d if `accumulate`: 64 rows of the warpgroup, 16 of a warp, in the
// fragments of mma.sync, 8 columns behind another. 16 deep in 16 bit, 32 in 8 bit. a
// and d stay as they are until the wait that covers the product.
#define SLA2_SUMS_32                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define SLA2_SUMS_64                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "            \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "            \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define SLA2_4(kind, d, i) kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3])
#define SLA2_16(kind, d, i)                                                                       \
    SLA2_4(kind, d, i), SLA2_4(kind, d, i + 4), SLA2_4(kind, d, i + 8), SLA2_4(kind, d, i + 12)
#define SLA2_OUT_32(kind, d) SLA2_16(kind, d, 0), SLA2_16(kind, d, 16)
#define SLA2_OUT_64(kind, d) SLA2_OUT_32(kind, d), SLA2_16(kind, d, 32), SLA2_16(kind, d, 48)


// The operands behind the sums: A in four registers or by its descriptor, B, the predicate.
#define SLA2_REGISTERS_32 "{%32, %33, %34, %35}, %36, p"
#define SLA2_REGISTERS_64 "{%64, %65, %66, %67}, %68, p"
#define SLA2_IF_32 "{ .reg .pred p; setp.ne.b32 p, %37, 0; "
#define SLA2_IF_64 "{ .reg .pred p; setp.ne.b32 p, %69, 0; "
#define SLA2_MAJOR_32 ", 1, 1, %38; }"
#define SLA2_MAJOR_64 ", 1, 1, %70; }"
#define SLA2_SHARED_32 "%32, %33, p"
#define SLA2_SHARED_64 "%64, %65, p"
#define SLA2_SHARED_IF_32 "{ .reg .pred p; setp.ne.b32 p, %34, 0; "
#define SLA2_SHARED_IF_64 "{ .reg .pred p; setp.ne.b32 p, %66, 0; "
#define SLA2_MAJORS_32 ", 1, 1, %35, %36; }"
#define SLA2_MAJORS_64 ", 1, 1, %67, %68; }"

#define SLA2_WGMMA_HALF(type, W, N)                                                               \
    template <int MAJOR_B>                                                                        \
    SLA2_PTX void wgmma_##type(float (&d)[W], const unsigned (&a)[4], descriptor_bits b,          \
                               int accumulate) {                                                  \
        asm volatile(SLA2_IF_##W "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #type "."      \
                     #type " " SLA2_SUMS_##W SLA2_REGISTERS_##W SLA2_MAJOR_##W                    \
                     : SLA2_OUT_##W("+f", d)                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),       \
                       "n"(MAJOR_B));                                                             \
    }                                                                                             \
    template <int MAJOR_A, int MAJOR_B>                                                           \
    SLA2_PTX void wgmma_##type##_shared(float (&d)[W], descriptor_bits a, descriptor_bits b,      \
                                        int accumulate) {                                         \
        asm volatile(SLA2_SHARED_IF_##W "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #type   \
                     "." #type " " SLA2_SUMS_##W SLA2_SHARED_##W SLA2_MAJORS_##W                  \
                     : SLA2_OUT_##W("+f", d)                                                      \
                     : "l"(a), "l"(b), "r"(accumulate), "n"(MAJOR_A), "n"(MAJOR_B));              \
    }

// 8-bit tiles are K major. `scales` are those that s8 has not.
#define SLA2_WGMMA_BYTES(type, Sum, sum, kind, scales, W, N)                                      \
    SLA2_PTX void wgmma_##type(Sum (&d)[W], const unsigned (&a)[4], descriptor_bits b,            \
                               int accumulate) {                                                  \
        asm volatile(SLA2_IF_##W "wgmma.mma_async.sync.aligned.m64n" #N "k32." sum "." #type "."  \
                     #type " " SLA2_SUMS_##W SLA2_REGISTERS_##W scales "; }"                      \
                     : SLA2_OUT_##W(kind, d)                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));      \
    }                                                                                             \
    SLA2_PTX void wgmma_##type##_shared(Sum (&d)[W], descriptor_bits a, descriptor_bits b,        \
                                        int accumulate) {                                         \
        asm volatile(SLA2_SHARED_IF_##W "wgmma.mma_async.sync.aligned.m64n" #N "k32." sum "."     \
                     #type "." #type " " SLA2_SUMS_##W SLA2_SHARED_##W scales "; }"               \
                     : SLA2_OUT_##W(kind, d)                                                      \
                     : "l"(a), "l"(b), "r"(accumulate));                                          \
    }

SLA2_WGMMA_HALF(bf16, 32, 64)
SLA2_WGMMA_HALF(bf16, 64, 128)
SLA2_WGMMA_HALF(f16, 32, 64)
SLA2_WGMMA_HALF(f16, 64, 128)
SLA2_WGMMA_BYTES(s8, int, "s32", "+r", "", 32, 64)
SLA2_WGMMA_BYTES(s8, int, "s32", "+r", "", 64, 128)
SLA2_WGMMA_BYTES(e4m3, float, "f32", "+f", ", 1, 1", 32, 64)
SLA2_WGMMA_BYTES(e4m3, float, "f32", "+f", ", 1, 1", 64, 128)

#endif
