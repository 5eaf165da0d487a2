// Block-sparse attention in 16 bit over the selected key blocks, with the linear branch and the mix
// in its epilogue.
#include "mix.cuh"

constexpr int KEY_TILES = BLOCK_K / 8;
constexpr int KEY_BYTES = BLOCK_K * HALF_ROW;  // one K or V tile
// What a multiprocessor has shared memory for.
constexpr int RESIDENT_BLOCKS = FAST_MMA || HEAD_DIM == 64 ? 2 : 1;
// What keeps every compiler within 255 registers: other unrolling makes some spill a few of them.
constexpr int SCORE_UNROLL =
    SLA2_ARCH == 100 ? 4 : (SLA2_ARCH == 80 || SLA2_ARCH == 120 ? 2 : HEAD_DIM / 16);

// One block of threads per query block; grid (T_m, B H). q, k, v and out may lie in any layout
// (strides: item, head, token). mean (B H, D): of K, which the softmax does not see and L is to
// leave out, or null. Shared memory: Q | two K tiles | two V tiles, reused at the end for
// phi(Q) | H | O. K of step t + 1 travels during Q K^T of step t, V of step t + 1 during P V of
// step t: README.md, "The cp.async ring".
extern "C" __global__ void __launch_bounds__(FWD_THREADS, RESIDENT_BLOCKS)
sla2_sparse_fwd(const half_bits* __restrict__ q, long long q_item, long long q_head, int q_step,
                const half_bits* __restrict__ k, long long k_item, long long k_head, int k_step,
                const half_bits* __restrict__ v, long long v_item, long long v_head, int v_step,
                const float* __restrict__ mean, const int* __restrict__ indices,
                const int* __restrict__ counts, int max_selected,
                const int* __restrict__ kv_lengths, const half_bits* __restrict__ state,
                const float* __restrict__ norm, const float* __restrict__ alpha,
                int alpha_stride_b, int alpha_stride_h, int alpha_stride_row, half_bits* out,
                long long out_item, long long out_head, int out_step, half_bits* out_sparse,
                float* lse, int num_heads, int n_q, int n_k, int channels,
                float softmax_scale) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* q_tile = shared;
    unsigned char* k_ring = shared + BLOCK_Q * HALF_ROW;
    unsigned char* v_ring = k_ring + 2 * KEY_BYTES;

    const int row_block = blockIdx.x, item = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const long long bh = blockIdx.y;
    const int first_row = row_block * BLOCK_Q, t_m = gridDim.x;
    const int length = valid_keys(kv_lengths, item, n_k);
    const int* list = indices + (bh * t_m + row_block) * max_selected;
    const int steps = blocks_with_keys(list, counts[bh * t_m + row_block], length);
    const bool some = steps > 0, rest = steps < ceil_div(length, BLOCK_K);
    q += item * q_item + head * q_head;
    k += item * k_item + head * k_head;
    v += item * v_item + head * v_head;

    const int row0 = threadIdx.x / 32 * FWD_WARP_ROWS;
    float o[FWD_M_TILES][D_TILES][4];
    clear(o);
    OnlineSoftmax<FWD_M_TILES> softmax;
    softmax.init();
    const float scale = softmax_scale * LOG2_E;

    int next = 0, tail = BLOCK_K;  // key block of the next step; valid keys of the last one
    if (some) {
        const int block = list[0];
        next = steps > 1 ? list[1] : 0;
        tail = length - list[steps - 1] * BLOCK_K;
        const long long at = static_cast<long long>(block) * BLOCK_K;
        // Two groups of copies before the loop: Q with the first K, then the first V.
        load_tile<BLOCK_Q, HALF_ROW, FWD_THREADS>(
            q_tile, q + static_cast<long long>(first_row) * q_step, 2 * q_step, n_q - first_row);
        load_tile<BLOCK_K, HALF_ROW, FWD_THREADS>(k_ring, k + at * k_step, 2 * k_step,
                                                  length - block * BLOCK_K);
        cp_async_commit();
        load_tile<BLOCK_K, HALF_ROW, FWD_THREADS>(v_ring, v + at * v_step, 2 * v_step,
                                                  length - block * BLOCK_K);
        cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        const unsigned char* k_tile = k_ring + (step & 1) * KEY_BYTES;
        const unsigned char* v_tile = v_ring + (step & 1) * KEY_BYTES;
        const int other = ((step + 1) & 1) * KEY_BYTES;
        const int next_at = next * BLOCK_K, next_valid = length - next_at;
        const bool more = step + 1 < steps;

        // All groups but the newest, which is V of this step, have landed: K is here. The barrier
        // makes every thread's copies visible, and tells that nobody reads the other K slot now.
        cp_async_wait<1>();
        __syncthreads();
        if (more)
            load_tile<BLOCK_K, HALF_ROW, FWD_THREADS>(k_ring + other,
                                                      k + static_cast<long long>(next_at) * k_step,
                                                      2 * k_step, next_valid);
        // Committed even if empty, so that "all but the newest" means the same in the last step.
        cp_async_commit();

        float s[FWD_M_TILES][KEY_TILES][4];
#pragma unroll
        for (int m = 0; m < FWD_M_TILES; ++m) clear(s[m]);
#pragma unroll SCORE_UNROLL
        for (int c = 0; c < HEAD_DIM / 16; ++c) {
            unsigned a[FWD_M_TILES][4];
#pragma unroll
            for (int m = 0; m < FWD_M_TILES; ++m)
                load_a<HALF_ROW>(a[m], q_tile, row0 + 16 * m, 2 * c);
#pragma unroll
            for (int n = 0; n < KEY_TILES; n += 2) {
                unsigned b[4];
                load_b<HALF_ROW>(b, k_tile, 8 * n, 2 * c);
#pragma unroll
                for (int m = 0; m < FWD_M_TILES; ++m) {
                    mma_half(s[m][n], a[m], &b[0]);
                    mma_half(s[m][n + 1], a[m], &b[2]);
                }
            }
        }
        // Indices ascend, so only the last block can hold keys that do not count.
        if (!more && tail < BLOCK_K) mask_tail(s, tail);
        // P up to 2^8 is harmless in 16 bit and in the fp32 sums, and saves most rescaling of o.
        softmax.update(s, o, scale, 8.0f);

        // The same for V: the newest group is K of the next step.
        cp_async_wait<1>();
        __syncthreads();
        if (more)
            load_tile<BLOCK_K, HALF_ROW, FWD_THREADS>(v_ring + other,
                                                      v + static_cast<long long>(next_at) * v_step,
                                                      2 * v_step, next_valid);
        cp_async_commit();
        next = step + 2 < steps ? list[step + 2] : 0;

#pragma unroll
        for (int c = 0; c < BLOCK_K / 16; ++c) {
            unsigned a[FWD_M_TILES][4];
#pragma unroll
            for (int m = 0; m < FWD_M_TILES; ++m)
                // The accumulators of two 8-key tiles are the A operand of 16 keys, as they lie:
                // register r is row g + 8 (r & 1) of the left (r < 2) or the right tile.
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    a[m][r] = pack_half(s[m][2 * c + (r >> 1)][2 * (r & 1)],
                                        s[m][2 * c + (r >> 1)][2 * (r & 1) + 1]);
#pragma unroll
            for (int n = 0; n < D_TILES; n += 2) {
                unsigned b[4];
                load_b_trans<HALF_ROW>(b, v_tile, 16 * c, 8 * n);
#pragma unroll
                for (int m = 0; m < FWD_M_TILES; ++m) {
                    mma_half(o[m][n], a[m], &b[0]);
                    mma_half(o[m][n + 1], a[m], &b[2]);
                }
            }
        }
    }
    cp_async_wait<0>();  // nothing may travel when the epilogue reuses the ring

    const MixArguments args =
        mix_arguments(q, q_step, channels, state, norm, alpha,
                      item * alpha_stride_b + head * alpha_stride_h + row_block * alpha_stride_row,
                      mean, out + item * out_item + head * out_head, out_step, out_sparse, lse,
                      n_q);
    mix_and_store(args, o, softmax, softmax_scale, 0.0f, some, rest, first_row, n_q, some,
                  q_tile, k_ring);
}
