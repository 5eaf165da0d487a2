// Kernels with one planted fault each, and their right siblings: what the emulator's own tests run.
// 64 threads a block.
#include "ptx.cuh"

// out[i] = the neighbour's in[i]; without the barrier a thread reads what may not be written yet.
extern "C" __global__ void __launch_bounds__(64)
neighbour(const float* in, float* out, int barrier) {
    SLA2_DYNAMIC_SHARED(bytes);
    float* shared = reinterpret_cast<float*>(bytes);
    shared[threadIdx.x] = in[threadIdx.x];
    if (barrier) __syncthreads();
    out[threadIdx.x] = shared[63 - threadIdx.x];
}

// The same through static shared memory, inside one warp, between two shuffles: a shuffle is no
// barrier.
extern "C" __global__ void __launch_bounds__(64)
warp_neighbour(const float* in, float* out, int barrier) {
    __shared__ float shared[64];
    float sum = warp_sum(in[threadIdx.x]);
    shared[threadIdx.x] = sum + in[threadIdx.x];
    if (barrier) __syncwarp();
    out[threadIdx.x] = shared[threadIdx.x ^ 1] - sum;
}

// A copy read after its wait, or before it.
extern "C" __global__ void __launch_bounds__(64)
copy(const float* in, float* out, int wait, int bytes) {
    SLA2_DYNAMIC_SHARED(shared);
    cp_async_16(shared + 16 * threadIdx.x, in + 4 * threadIdx.x, bytes);
    cp_async_commit();
    if (wait) cp_async_wait<0>();
    for (int i = 0; i < 4; ++i)
        out[4 * threadIdx.x + i] = reinterpret_cast<float*>(shared)[4 * threadIdx.x + i];
    cp_async_wait<0>();
}

// Two stages in flight: waiting for all but one covers the older copy only.
extern "C" __global__ void __launch_bounds__(64) stages(const float* in, float* out) {
    SLA2_DYNAMIC_SHARED(shared);
    for (int stage = 0; stage < 2; ++stage) {
        unsigned char* to = shared + 1024 * stage + 16 * threadIdx.x;
        cp_async_16(to, in + 256 * stage + 4 * threadIdx.x, 16);
        cp_async_commit();
    }
    const float* mine = reinterpret_cast<float*>(shared) + 4 * threadIdx.x;
    cp_async_wait<1>();
    out[threadIdx.x] = mine[0];
    out[64 + threadIdx.x] = mine[256];
    cp_async_wait<0>();
    out[128 + threadIdx.x] = mine[256];
}

extern "C" __global__ void __launch_bounds__(64) never_waits(const float* in, float* out) {
    SLA2_DYNAMIC_SHARED(shared);
    cp_async_16(shared + 16 * threadIdx.x, in, 16);
    out[threadIdx.x] = 1.0f;
}

// One past the end: of the output (which = 1), of dynamic (2) or static (3) shared memory.
extern "C" __global__ void __launch_bounds__(64) past_the_end(float* out, int n, int which) {
    SLA2_DYNAMIC_SHARED(bytes);
    __shared__ float fixed[64];
    float* dynamic = reinterpret_cast<float*>(bytes);
    int i = threadIdx.x;
    fixed[(i + (which == 3)) % 65] = 1.0f;
    dynamic[i + (which == 2)] = 2.0f;
    __syncthreads();
    if (i + blockIdx.x * 64 < n + (which == 1)) out[i + blockIdx.x * 64] = fixed[i] + dynamic[i];
}

extern "C" __global__ void __launch_bounds__(64) skips_shuffle(float* out, int lane) {
    float value = 1.0f;
    if (threadIdx.x != lane) value += shfl_xor(value, 1);
    __syncthreads();
    out[threadIdx.x] = value;
}

extern "C" __global__ void __launch_bounds__(64) returns_early(float* out, int lane) {
    if (threadIdx.x == lane) return;
    out[threadIdx.x] = warp_sum(1.0f);
}

extern "C" __global__ void __launch_bounds__(64) two_barriers(float* out, int from) {
    if (threadIdx.x < from) {
        __syncthreads();  // one barrier
    } else {
        __syncthreads();  // another barrier
    }
    out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void __launch_bounds__(64) misaligned(const float* in, float* out) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned r[4];
    ldmatrix_x4(r, shared + 16 * (threadIdx.x % 32) + 8);  // a misaligned row
    out[threadIdx.x] = r[0];
}

// The neighbour's value through cp.async by a quarter of the threads: each waits for its own
// copies, not for the others'.
extern "C" __global__ void __launch_bounds__(64)
copied_neighbour(const float* in, float* out, int barrier) {
    SLA2_DYNAMIC_SHARED(bytes);
    if (threadIdx.x < 16) cp_async_16(bytes + 16 * threadIdx.x, in + 4 * threadIdx.x, 16);
    cp_async_commit();
    cp_async_wait<0>();
    if (barrier) __syncthreads();
    out[threadIdx.x] = reinterpret_cast<float*>(bytes)[63 - threadIdx.x];
}
