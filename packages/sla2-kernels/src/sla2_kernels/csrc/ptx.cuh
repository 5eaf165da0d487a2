// Every inline PTX instruction the kernels use, each as one small function, and short names of two
// warp collectives. Shared-memory pointers are generic; they are converted here. The emulator
// supplies the same functions for the CPU.
#pragma once

#ifdef SLA2_EMULATOR
#include "emulated_ptx.h"
#else

#define SLA2_PTX static __device__ __forceinline__

// The block's dynamic shared memory.
#define SLA2_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

SLA2_PTX unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes global -> shared, of which the first valid_bytes (0 or 16) are read and the rest
// are zeros.
SLA2_PTX void cp_async_16(void* smem, const void* gmem, int valid_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(smem)), "l"(gmem), "r"(valid_bytes)
                 : "memory");
}

// 16 bytes from global memory that no kernel writes meanwhile, in one load.
SLA2_PTX uint4 load_16(const void* gmem) {
    uint4 r;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
        : "l"(gmem));
    return r;
}

SLA2_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's most recent groups are still in flight.
template <int N>
SLA2_PTX void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lanes 8 i .. 8 i + 7 hold the row addresses of matrix i.
SLA2_PTX void ldmatrix_x4(unsigned* r, const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem))
                 : "memory");
}

SLA2_PTX void ldmatrix_x4_trans(unsigned* r, const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem))
                 : "memory");
}

// c += a b, a row-major 16 x 16, b column-major 16 x 8, fp32 accumulators.
SLA2_PTX void mma_m16n8k16_f16(float* c, const unsigned* a, const unsigned* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

SLA2_PTX void mma_m16n8k16_bf16(float* c, const unsigned* a, const unsigned* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b, a row-major 16 x 32, b column-major 32 x 8, 8-bit operands.
SLA2_PTX void mma_m16n8k32_s8(int* c, const unsigned* a, const unsigned* b) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if SLA2_ARCH >= 89
SLA2_PTX void mma_m16n8k32_e4m3(float* c, const unsigned* a, const unsigned* b) {
#ifdef __CUDA_ARCH_FEAT_SM120_ALL
    // With a scale, here 2^(127 - 127) = 1, for each 32 values of a row of a and of a column of b.
    // GeForce multiplies e4m3 with fp32 sums at half the rate without one.
    const unsigned one = 0x7f7f7f7fu;
    const unsigned short first = 0;  // which byte of `one`, and which lanes' it is
    asm("mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3"
        ".f32.ue8m0 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, "
        "%10, {%11, %11}, %10, {%11, %11};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(one), "h"(first));
#else
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two floats -> two FP8 E4M3 values, nearest even, saturating at +-448, NaN stays NaN; `low` is in
// bits 0-7.
SLA2_PTX unsigned short cvt_e4m3x2(float low, float high) {
    unsigned short r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}

SLA2_PTX float e4m3_to_f32(unsigned char x) {
    float r;
    asm("{ .reg .b32 pair; .reg .b16 low, high; cvt.rn.f16x2.e4m3x2 pair, %1; "
        "mov.b32 {low, high}, pair; cvt.f32.f16 %0, low; }"
        : "=f"(r)
        : "h"(static_cast<unsigned short>(x)));
    return r;
}

// Two FP8 E4M3 values -> two fp16; the first in the lower bits of both.
SLA2_PTX unsigned e4m3x2_to_f16x2(unsigned short x) {
    unsigned r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(x));
    return r;
}
#endif

// Products of two pairs of fp16.
SLA2_PTX unsigned mul_f16x2(unsigned a, unsigned b) {
    unsigned r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// Each byte becomes eight copies of its highest bit.
SLA2_PTX unsigned byte_signs(unsigned x) {
    unsigned r;
    asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(r) : "r"(x));
    return r;
}

// Two floats -> two 16-bit floats, nearest even; `low` is in bits 0-15.
SLA2_PTX unsigned pack_f16x2(float low, float high) {
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

SLA2_PTX unsigned pack_bf16x2(float low, float high) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

SLA2_PTX float f16_to_f32(unsigned short x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
    return r;
}

SLA2_PTX float bf16_to_f32(unsigned short x) {
    return __uint_as_float(static_cast<unsigned>(x) << 16);
}

// 2^x to about 2 ulp; 0 where it is below 2^-126, the smallest normal number. Keeping subnormals
// would cost three more instructions each time.
SLA2_PTX float exp2_approx(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// 1 / x to about 1 ulp, for normal x whose inverse is normal.
SLA2_PTX float inverse_approx(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// The larger of two floats, NaN if either is (fmaxf would hide it).
SLA2_PTX float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

// The warp's sum of an integer, in one instruction.
SLA2_PTX int warp_total(int x) {
    int r;
    asm volatile("redux.sync.add.s32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(x));
    return r;
}

template <class T>
SLA2_PTX T shfl_xor(T v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
}

template <class T>
SLA2_PTX T warp_sum(T v) {
    for (int mask = 16; mask > 0; mask >>= 1) v += shfl_xor(v, mask);
    return v;
}

#endif
