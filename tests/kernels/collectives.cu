// Each warp collective and conversion by itself, on one warp: what the emulator's own tests compare
// with numpy.
#include "ptx.cuh"

// c (16 x 8) = c + a (16 x K) b (8 x K, transposed), operands through ldmatrix; rows of 32 bytes.
template <class Sum>
using Multiply = void (*)(Sum*, const unsigned*, const unsigned*);

template <class Sum>
static __device__ __forceinline__ void multiply(unsigned char* shared, const uint4* a,
                                                const uint4* b, Sum* c, Multiply<Sum> mma) {
    int lane = threadIdx.x;
    reinterpret_cast<uint4*>(shared)[lane] = a[lane];
    if (lane < 16) reinterpret_cast<uint4*>(shared + 512)[lane] = b[lane];
    __syncthreads();
    unsigned x[4], y[4];
    ldmatrix_x4(x, shared + 32 * (lane % 16) + 16 * (lane / 16));
    ldmatrix_x4(y, shared + 512 + 32 * (lane % 8) + 16 * (lane / 8 % 2));
    Sum sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = c[8 * (lane / 4 + i / 2 * 8) + lane % 4 * 2 + i % 2];
    mma(sum, x, y);
    for (int i = 0; i < 4; ++i) c[8 * (lane / 4 + i / 2 * 8) + lane % 4 * 2 + i % 2] = sum[i];
}

extern "C" __global__ void __launch_bounds__(32)
test_mma_f16(const uint4* a, const uint4* b, float* c) {
    SLA2_DYNAMIC_SHARED(shared);
    multiply<float>(shared, a, b, c, [](float* d, const unsigned* x, const unsigned* y) {
        mma_m16n8k16_f16(d, x, y);
    });
}

extern "C" __global__ void __launch_bounds__(32)
test_mma_bf16(const uint4* a, const uint4* b, float* c) {
    SLA2_DYNAMIC_SHARED(shared);
    multiply<float>(shared, a, b, c, [](float* d, const unsigned* x, const unsigned* y) {
        mma_m16n8k16_bf16(d, x, y);
    });
}

extern "C" __global__ void __launch_bounds__(32)
test_mma_s8(const uint4* a, const uint4* b, int* c) {
    SLA2_DYNAMIC_SHARED(shared);
    multiply<int>(shared, a, b, c,
                  [](int* d, const unsigned* x, const unsigned* y) { mma_m16n8k32_s8(d, x, y); });
}

extern "C" __global__ void __launch_bounds__(32)
test_mma_e4m3(const uint4* a, const uint4* b, float* c) {
    SLA2_DYNAMIC_SHARED(shared);
    multiply<float>(shared, a, b, c, [](float* d, const unsigned* x, const unsigned* y) {
        mma_m16n8k32_e4m3(d, x, y);
    });
}

// out (8 x 4 matrices of 8 x 8) is each matrix of `in` transposed.
extern "C" __global__ void __launch_bounds__(32) test_transpose(const uint4* in, unsigned* out) {
    SLA2_DYNAMIC_SHARED(shared);
    int lane = threadIdx.x;
    reinterpret_cast<uint4*>(shared)[lane] = in[lane];
    __syncthreads();
    unsigned r[4];
    ldmatrix_x4_trans(r, shared + 16 * lane);
    for (int m = 0; m < 4; ++m) out[32 * m + lane] = r[m];
}

extern "C" __global__ void __launch_bounds__(64) test_shuffles(const int* in, int* out) {
    int i = threadIdx.x, v = in[i];
    out[i] = __shfl_xor_sync(0xffffffffu, v, 5);
    out[64 + i] = __shfl_up_sync(0xffffffffu, v, 3);
    out[128 + i] = __shfl_down_sync(0xffffffffu, v, 3);
    out[192 + i] = __shfl_sync(0xffffffffu, v, i * 7);
    out[256 + i] = warp_sum(v);
    out[320 + i] = __ballot_sync(0xffffffffu, v & 1);
    out[384 + i] = __any_sync(0xffffffffu, v == 40) + 2 * __all_sync(0xffffffffu, v < 40);
    out[448 + i] = __syncthreads_count(v & 1);
}

extern "C" __global__ void __launch_bounds__(64)
test_pack(const float* in, unsigned* f16, unsigned* bf16, unsigned short* fp8, int n) {
    int i = blockIdx.x * 64 + threadIdx.x;
    if (i >= n) return;
    f16[i] = pack_f16x2(in[2 * i], in[2 * i + 1]);
    bf16[i] = pack_bf16x2(in[2 * i], in[2 * i + 1]);
    fp8[i] = cvt_e4m3x2(in[2 * i], in[2 * i + 1]);
}

extern "C" __global__ void __launch_bounds__(64) test_unpack(float* f16, float* bf16) {
    int i = blockIdx.x * 64 + threadIdx.x;
    f16[i] = f16_to_f32(static_cast<unsigned short>(i));
    bf16[i] = bf16_to_f32(static_cast<unsigned short>(i));
}
