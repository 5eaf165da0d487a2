// wgmma on operands as the host has laid them out in shared memory: what the emulator's own tests
// compare with numpy. 128 threads; two products, 16 deep each in 16 bit and 32 in 8 bit.
#include "sm90/ptx_sm90.cuh"

struct Operand {  // of the second product `step` bytes further
    int at, leading, stride, step;
};

static __device__ __forceinline__ descriptor_bits describe(const unsigned char* shared, Operand x,
                                                           int swizzle, int product) {
    const unsigned char* at = shared + x.at + product * x.step;
    if (swizzle == 0) return matrix_descriptor<0>(at, x.leading, x.stride);
    if (swizzle == 32) return matrix_descriptor<32>(at, x.leading, x.stride);
    if (swizzle == 64) return matrix_descriptor<64>(at, x.leading, x.stride);
    return matrix_descriptor<128>(at, x.leading, x.stride);
}

// d (64 x 2 WORDS) = A B: `multiply` issues one product.
template <class Sum, int WORDS, class Multiply>
static __device__ __forceinline__ void product(const uint4* image, int chunks,
                                               const unsigned* fragments, Sum* out, Operand a,
                                               Operand b, int swizzle, Multiply multiply) {
    SLA2_ALIGNED_SHARED(shared);
    const int i = threadIdx.x, row = i / 32 * 16 + i % 32 / 4, column = i % 4 * 2;
    for (int c = i; c < chunks; c += 128) reinterpret_cast<uint4*>(shared)[c] = image[c];
    fence_proxy_async();
    __syncthreads();
    Sum d[WORDS];
    unsigned in[2][4];
    for (int p = 0; p < 2; ++p)
        for (int r = 0; r < 4; ++r) in[p][r] = fragments[(p * 128 + i) * 4 + r];
    wgmma_fence();
#pragma unroll
    for (int p = 0; p < 2; ++p)
        multiply(d, in[p], describe(shared, a, swizzle, p), describe(shared, b, swizzle, p), p);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int e = 0; e < WORDS; ++e)
        out[(row + e / 2 % 2 * 8) * 2 * WORDS + e / 4 * 8 + column + e % 2] = d[e];
}

#define PARAMETERS(Sum)                                                                           \
    const uint4 *image, int chunks, const unsigned *fragments, Sum *out, int a_at, int a_leading, \
        int a_stride, int a_step, int b_at, int b_leading, int b_stride, int b_step, int swizzle
#define PRODUCT(Sum, WORDS, call)                                                                 \
    product<Sum, WORDS>(image, chunks, fragments, out,                                            \
                        Operand{a_at, a_leading, a_stride, a_step},                               \
                        Operand{b_at, b_leading, b_stride, b_step}, swizzle,                      \
                        [](Sum(&d)[WORDS], const unsigned(&x)[4], descriptor_bits a,              \
                           descriptor_bits b, int more) { call; })

extern "C" __global__ void __launch_bounds__(128) bf16_registers_k(PARAMETERS(float)) {
    PRODUCT(float, 32, wgmma_bf16<K_MAJOR>(d, x, b, more));
}

extern "C" __global__ void __launch_bounds__(128) bf16_registers_mn(PARAMETERS(float)) {
    PRODUCT(float, 64, wgmma_bf16<MN_MAJOR>(d, x, b, more));
}

extern "C" __global__ void __launch_bounds__(128) bf16_shared_k_k(PARAMETERS(float)) {
    PRODUCT(float, 64, (wgmma_bf16_shared<K_MAJOR, K_MAJOR>(d, a, b, more)));
}

extern "C" __global__ void __launch_bounds__(128) f16_registers_mn(PARAMETERS(float)) {
    PRODUCT(float, 32, wgmma_f16<MN_MAJOR>(d, x, b, more));
}

extern "C" __global__ void __launch_bounds__(128) f16_shared_mn_k(PARAMETERS(float)) {
    PRODUCT(float, 32, (wgmma_f16_shared<MN_MAJOR, K_MAJOR>(d, a, b, more)));
}

extern "C" __global__ void __launch_bounds__(128) f16_shared_k_mn(PARAMETERS(float)) {
    PRODUCT(float, 64, (wgmma_f16_shared<K_MAJOR, MN_MAJOR>(d, a, b, more)));
}

extern "C" __global__ void __launch_bounds__(128) s8_registers_k(PARAMETERS(int)) {
    PRODUCT(int, 32, wgmma_s8(d, x, b, more));
}

extern "C" __global__ void __launch_bounds__(128) s8_shared_k_k(PARAMETERS(int)) {
    PRODUCT(int, 64, wgmma_s8_shared(d, a, b, more));
}

extern "C" __global__ void __launch_bounds__(128) e4m3_registers_k(PARAMETERS(float)) {
    PRODUCT(float, 64, wgmma_e4m3(d, x, b, more));
}

extern "C" __global__ void __launch_bounds__(128) e4m3_shared_k_k(PARAMETERS(float)) {
    PRODUCT(float, 32, wgmma_e4m3_shared(d, a, b, more));
}
