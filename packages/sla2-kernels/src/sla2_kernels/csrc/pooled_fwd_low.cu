// Block-sparse attention in 8 bit over the selected key blocks and, in the same softmax, one pooled
// key in 16 bit for each of the others.
#include "pooled.cuh"
#include "selected_low.cuh"

// The selected part lies in the first LOW_BYTES of shared memory: Q | two K tiles | two V^T tiles.
// Pooled tiles follow: two of V and the first slot of K in its place, the second slot of K and Q in
// 16 bit behind it, so that those travel while it ends.
constexpr int SELECTED_BYTES = BLOCK_Q * HEAD_DIM + 4 * LOW_KEY_BYTES;
constexpr int LOW_BYTES = SELECTED_BYTES > 3 * KEY_BYTES ? SELECTED_BYTES : 3 * KEY_BYTES;

// Grid (T_m, B H). q in 16 bit; k_bytes (B H, n_k, D), v_bytes (B H, T_n, D, BLOCK_K) transposed
// and permuted, scales (B H, T_m), (B H, T_n), (B H, D). What is pooled as of pooled_fwd, of the K
// that k_bytes were made of.
extern "C" __global__ void __launch_bounds__(FWD_THREADS, 1)
sla2_pooled_fwd_low(const half_bits* __restrict__ q, long long q_item, long long q_head,
                    int q_step, const unsigned char* __restrict__ k_bytes,
                    const unsigned char* __restrict__ v_bytes, const float* __restrict__ q_scale,
                    const float* __restrict__ k_scale, const float* __restrict__ v_scale,
                    const int* __restrict__ indices, const int* __restrict__ counts,
                    int max_selected, const int* __restrict__ kv_lengths,
                    const half_bits* __restrict__ pooled_k,
                    const half_bits* __restrict__ pooled_v, const unsigned* __restrict__ bits,
                    const float* __restrict__ bias, int bias_stride_b, int bias_stride_h,
                    int bias_stride_row, half_bits* out, long long out_item, long long out_head,
                    int out_step, float* lse, int num_heads, int n_q, int n_k,
                    float softmax_scale) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* low_k = shared + BLOCK_Q * HEAD_DIM;
    unsigned char* v_ring = shared;
    unsigned char* k_ring = shared + LOW_BYTES - KEY_BYTES;
    unsigned char* q_tile = shared + LOW_BYTES + KEY_BYTES;

    const int row_block = blockIdx.x, item = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const long long bh = blockIdx.y;
    const int first_row = row_block * BLOCK_Q, t_m = gridDim.x, t_n = ceil_div(n_k, BLOCK_K);
    const Selection selected = selection(indices, counts, max_selected, bh * t_m + row_block,
                                         valid_keys(kv_lengths, item, n_k));
    const PooledKeys pooled = pooled_keys(pooled_k, pooled_v, bits, selected, bh,
                                          bh * t_m + row_block, n_k);
    q += item * q_item + head * q_head + static_cast<long long>(first_row) * q_step;
    k_bytes += bh * n_k * HEAD_DIM;
    v_bytes += bh * t_n * LOW_KEY_BYTES;
    k_scale += bh * t_n;

    float o[FWD_M_TILES][D_TILES][4];
    clear(o);
    OnlineSoftmax<FWD_M_TILES> softmax;
    softmax.init();
    const auto first_k = [&] {
        if (pooled.tiles == 0) return;
        load_tile<BLOCK_Q, HALF_ROW, FWD_THREADS>(q_tile, q, 2 * q_step, n_q - first_row);
        load_pooled(k_ring + KEY_BYTES, pooled.k, pooled, 0);
    };
    // Without the key block's scale, which goes into the scores.
    const float query_scale = q_scale[bh * t_m + row_block];
    attend_selected_low(o, softmax, softmax_scale * query_scale, selected, q, q_step,
                        n_q - first_row, query_scale, k_bytes, k_scale, v_bytes, shared, low_k,
                        low_k + 2 * LOW_KEY_BYTES, first_k);
    bias += item * bias_stride_b + head * bias_stride_h + row_block * bias_stride_row;
    const float whole = log_size(BLOCK_K, *bias, softmax_scale);
    if (selected.steps == 0) {
        first_k();
        cp_async_commit();
    } else {  // to the units of the pooled part
        scale_channels(o, v_scale + bh * HEAD_DIM, 1.0f / PV_LIMIT);
#pragma unroll
        for (int m = 0; m < FWD_M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                softmax.maximum[m][r] = softmax.maximum[m][r] * query_scale - whole;
                softmax.sum[m][r] *= 1.0f / PV_LIMIT;
            }
    }
    __syncthreads();  // V takes the place of tiles that other warps may still read
    if (pooled.tiles > 0) load_pooled(v_ring + KEY_BYTES, pooled.v, pooled, 0);
    cp_async_commit();
    attend_pooled(o, softmax, softmax_scale, pooled, q_tile, k_ring, v_ring, 1);
    store_joint(o, softmax, softmax_scale, whole, pooled.blocks > 0, q_tile,
                out + item * out_item + head * out_head, out_step, lse + bh * n_q, first_row, n_q);
}
