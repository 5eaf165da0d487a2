// Block-sparse attention in 16 bit over the selected key blocks, with the linear branch and the mix
// in its epilogue.
#include "selected.cuh"

// One block of threads per query block; grid (T_m, B H). q, k, v and out may lie in any layout
// (strides: item, head, token). mean (B H, D): of K, which the softmax does not see and L is to
// leave out, or null. Shared memory: Q | two K tiles | two V tiles, reused at the end for
// phi(Q) | H | O.
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
    const Selection blocks = selection(indices, counts, max_selected, bh * t_m + row_block,
                                       valid_keys(kv_lengths, item, n_k));
    const bool some = blocks.steps > 0, rest = blocks.steps < ceil_div(blocks.length, BLOCK_K);
    q += item * q_item + head * q_head;
    k += item * k_item + head * k_head;
    v += item * v_item + head * v_head;

    float o[FWD_M_TILES][D_TILES][4];
    clear(o);
    OnlineSoftmax<FWD_M_TILES> softmax;
    softmax.init();
    const auto nothing = [](unsigned char*) {};
    attend_selected<SCORE_UNROLL>(o, softmax, softmax_scale * LOG2_E, blocks,
                    q + static_cast<long long>(first_row) * q_step, q_step, n_q - first_row, k,
                    k_step, v, v_step, q_tile, k_ring, v_ring, nothing, nothing);
    cp_async_wait<0>();  // nothing may travel when the epilogue reuses the ring

    const MixArguments args =
        mix_arguments(q, q_step, channels, state, norm, alpha,
                      item * alpha_stride_b + head * alpha_stride_h + row_block * alpha_stride_row,
                      mean, out + item * out_item + head * out_head, out_step, out_sparse, lse,
                      n_q);
    mix_and_store(args, o, softmax, softmax_scale, 0.0f, some, rest, first_row, n_q, some,
                  q_tile, k_ring);
}
