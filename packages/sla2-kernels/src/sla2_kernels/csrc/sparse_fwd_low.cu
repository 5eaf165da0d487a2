// Block-sparse attention in 8 bit (int8 or FP8 Q K^T, FP8 or int8 P V) over the selected key
// blocks; epilogue as in 16 bit.
#include "selected_low.cuh"

// Grid (T_m, B H). q in 16 bit; k_bytes (B H, n_k, D), v_bytes (B H, T_n, D, BLOCK_K) transposed
// and permuted, scales (B H, T_m), (B H, T_n), (B H, D). Shared memory: Q | two K tiles | two V^T
// tiles, and at the end phi(Q) | H | O. Copies travel as in sparse_fwd.
extern "C" __global__ void __launch_bounds__(FWD_THREADS, 1)
sla2_sparse_fwd_low(const half_bits* __restrict__ q, long long q_item, long long q_head,
                    int q_step, const unsigned char* __restrict__ k_bytes,
                    const unsigned char* __restrict__ v_bytes, const float* __restrict__ q_scale,
                    const float* __restrict__ k_scale, const float* __restrict__ v_scale,
                    const int* __restrict__ indices, const int* __restrict__ counts,
                    int max_selected, const int* __restrict__ kv_lengths,
                    const half_bits* __restrict__ state, const float* __restrict__ norm,
                    const float* __restrict__ alpha,
                    int alpha_stride_b, int alpha_stride_h, int alpha_stride_row, half_bits* out,
                    long long out_item, long long out_head, int out_step, half_bits* out_sparse,
                    float* lse, int num_heads, int n_q, int n_k, int channels,
                    float softmax_scale) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* q_tile = shared;
    unsigned char* k_ring = q_tile + BLOCK_Q * HEAD_DIM;
    unsigned char* v_ring = k_ring + 2 * LOW_KEY_BYTES;

    const int row_block = blockIdx.x, item = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const long long bh = blockIdx.y;
    const int first_row = row_block * BLOCK_Q, t_m = gridDim.x, t_n = ceil_div(n_k, BLOCK_K);
    const Selection blocks = selection(indices, counts, max_selected, bh * t_m + row_block,
                                       valid_keys(kv_lengths, item, n_k));
    const bool some = blocks.steps > 0, rest = blocks.steps < ceil_div(blocks.length, BLOCK_K);
    q += item * q_item + head * q_head;
    k_bytes += bh * n_k * HEAD_DIM;
    v_bytes += bh * t_n * LOW_KEY_BYTES;
    k_scale += bh * t_n;

    float o[FWD_M_TILES][D_TILES][4];
    clear(o);
    OnlineSoftmax<FWD_M_TILES> softmax;
    softmax.init();
    // Without the key block's scale, which goes into the scores.
    const float query_scale = q_scale[bh * t_m + row_block];
    const float row_scale = softmax_scale * query_scale;
    attend_selected_low(o, softmax, row_scale, blocks,
                        q + static_cast<long long>(first_row) * q_step, q_step, n_q - first_row,
                        query_scale, k_bytes, k_scale, v_bytes, q_tile, k_ring, v_ring, [] {});
    cp_async_wait<0>();
    scale_channels(o, v_scale + bh * HEAD_DIM, 1.0f);

    const MixArguments args =
        mix_arguments(q, q_step, channels, state, norm, alpha,
                      item * alpha_stride_b + head * alpha_stride_h + row_block * alpha_stride_row,
                      nullptr, out + item * out_item + head * out_head, out_step, out_sparse, lse,
                      n_q);
    mix_and_store(args, o, softmax, row_scale, LOG2_PV_LIMIT * LN_2, some, rest, first_row, n_q,
                  false, shared, shared + BLOCK_Q * HALF_ROW);
}
