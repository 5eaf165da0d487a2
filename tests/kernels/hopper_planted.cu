// A pipeline of bulk copies and wgmma with one planted fault at a time, and other faults on Hopper:
// what the emulator's own tests run. 384 threads: a producer, a consumer and an idle warpgroup.
#include "sm90/ptx_sm90.cuh"

enum Fault {
    NONE,
    NO_FULL_WAIT,
    WRONG_PHASE,
    EARLY_REUSE,
    A_OVERWRITTEN,
    D_OVERWRITTEN,
    D_READ,
    NO_FENCE,
    TOO_MANY_BYTES,
    TOO_FEW_BYTES,
    NO_PROXY_FENCE,
    NEVER_WAITED,
    LAST_NOT_WAITED,
    INIT_UNPUBLISHED,
    SECOND_ARRIVAL,
    WRONG_SWIZZLE,
    STAGE_WRITTEN,
    EARLY_RELEASE,
};

constexpr int STAGES = 2, TILE = 64 * 128;

// out (64 x 64) = sum over `steps` tiles (64 keys x 64 channels, K major, 128-byte swizzle) of
// A (64 x 16, ones) times the first 16 channels; the last tile goes through registers.
extern "C" __global__ void __launch_bounds__(384, 1)
pipeline(const unsigned char* tiles, float* out, int steps, int fault) {
    SLA2_ALIGNED_SHARED(shared);
    unsigned long long* full = reinterpret_cast<unsigned long long*>(shared + (STAGES + 1) * TILE);
    unsigned long long* empty = full + STAGES;
    const int i = threadIdx.x % 128, warpgroup = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) mbarrier_init(full + s, 1), mbarrier_init(empty + s, 1);
        if (fault != INIT_UNPUBLISHED) fence_proxy_async();
    }
    __syncthreads();
    if (warpgroup != 1) {
        setmaxnreg_dec<24>();
        if (threadIdx.x < 32 && elect_one()) {
            for (int t = 0; t + 1 < steps; ++t) {
                const int s = t % STAGES;
                const int bytes =
                    TILE + (fault == TOO_MANY_BYTES ? 16 : 0) - (fault == TOO_FEW_BYTES ? 16 : 0);
                if (fault != EARLY_REUSE) mbarrier_wait(empty + s, (t / STAGES & 1) ^ 1);
                mbarrier_arrive_expect(full + s, bytes);  // the bytes
                bulk_load(shared + s * TILE, tiles + t * TILE, TILE, full + s);  // the copy
                if (fault == SECOND_ARRIVAL) mbarrier_arrive(full + s);  // one arrival too many
            }
        }
        return;
    }
    setmaxnreg_inc<240>();
    unsigned ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
    float d[32];
    for (int e = 0; e < 32; ++e) d[e] = 0.0f;
    for (int t = 0; t + 1 < steps; ++t) {
        const int s = t % STAGES;
        const unsigned phase = t / STAGES & 1;
        if (fault != NO_FULL_WAIT)
            mbarrier_wait(full + s, fault == WRONG_PHASE ? phase ^ 1 : phase);  // the phase
        if (fault != NO_FENCE) wgmma_fence();
        if (fault == WRONG_SWIZZLE)
            wgmma_bf16<K_MAJOR>(d, ones, matrix_descriptor<64>(shared + s * TILE, 16, 1024), 1);
        else
            wgmma_bf16<K_MAJOR>(d, ones,  // the product
                                matrix_descriptor<128>(shared + s * TILE, 16, 1024), 1);
        wgmma_commit();
        if (fault == A_OVERWRITTEN) ones[1] = 0;
        if (fault == D_OVERWRITTEN) d[3] *= 0.5f, d[3] = 1.0f;
        if (fault == D_READ) out[64 * 64 + i] = d[5];
        if (fault == STAGE_WRITTEN && i < 64) shared[s * TILE + i * 128] += 1;
        if (fault == EARLY_RELEASE && i == 0) mbarrier_arrive(empty + s);
        if (fault != NEVER_WAITED) wgmma_wait<0>();  // the wait
        if (fault != EARLY_RELEASE && i == 0) mbarrier_arrive(empty + s);
    }
    // The last tile, row i / 2 by two threads: generic stores need the proxy fence.
    unsigned char* last = shared + STAGES * TILE;
    for (int c = i; c < TILE / 16; c += 128)
        reinterpret_cast<uint4*>(last)[c] =
            reinterpret_cast<const uint4*>(tiles + (steps - 1) * TILE)[c];
    if (fault != NO_PROXY_FENCE) fence_proxy_async();
    named_barrier_sync(1, 128);
    wgmma_fence();
    wgmma_bf16<K_MAJOR>(d, ones, matrix_descriptor<128>(last, 16, 1024), 1);  // of written memory
    wgmma_commit();
    if (fault != LAST_NOT_WAITED) wgmma_wait<0>();
    const int row = i / 32 * 16 + i % 32 / 4, column = i % 4 * 2;
    for (int e = 0; e < 32; ++e)
        out[(row + e / 2 % 2 * 8) * 64 + e / 4 * 8 + column + e % 2] = d[e];
}

// Named barriers: warps 1 to 11 write, warp 0 reads what all wrote.
extern "C" __global__ void __launch_bounds__(384, 1) named(const float* in, float* out, int fault) {
    SLA2_ALIGNED_SHARED(bytes);
    float* shared = reinterpret_cast<float*>(bytes);
    shared[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x >= 32) {
        named_barrier_arrive(2, fault == 1 && threadIdx.x >= 224 ? 224 : 384);  // arrives
    } else {
        if (fault != 2) named_barrier_sync(2, 384);  // waits
        float sum = 0.0f;
        for (int i = 0; i < 12; ++i) sum += shared[threadIdx.x + 32 * i];
        out[threadIdx.x] = sum;
    }
    if (fault == 3) setmaxnreg_inc<240>();  // more than there are
}
