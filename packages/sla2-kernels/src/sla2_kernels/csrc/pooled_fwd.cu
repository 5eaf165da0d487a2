// Block-sparse attention in 16 bit over the selected key blocks and, in the same softmax, one
// pooled key for each of the others.
#include "pooled.cuh"

// Whether the first pooled tiles travel while the last selected ones are computed; on sm_100 ptxas
// spills with it.
constexpr bool EARLY_POOLED = SLA2_ARCH != 100;
constexpr int SELECTED_UNROLL = SLA2_ARCH == 90 ? 4 : SCORE_UNROLL;  // pooled keys follow

// One block of threads per query block; grid (T_m, B H). q, k, v and out may lie in any layout
// (strides: item, head, token). mean (B H, D): of K, which pooled_k and L leave out, or null.
// pooled_k, pooled_v (B H, T_n, D); bits (B H, T_m, ceil(T_n / 32)); bias: b of each row block,
// with its strides. Shared memory: Q | two K tiles | two V tiles; Q's part is reused for O.
extern "C" __global__ void __launch_bounds__(FWD_THREADS, RESIDENT_BLOCKS)
sla2_pooled_fwd(const half_bits* __restrict__ q, long long q_item, long long q_head, int q_step,
                const half_bits* __restrict__ k, long long k_item, long long k_head, int k_step,
                const half_bits* __restrict__ v, long long v_item, long long v_head, int v_step,
                const float* __restrict__ mean, const int* __restrict__ indices,
                const int* __restrict__ counts, int max_selected,
                const int* __restrict__ kv_lengths, const half_bits* __restrict__ pooled_k,
                const half_bits* __restrict__ pooled_v, const unsigned* __restrict__ bits,
                const float* __restrict__ bias, int bias_stride_b, int bias_stride_h,
                int bias_stride_row, half_bits* out, long long out_item, long long out_head,
                int out_step, float* lse, int num_heads, int n_q, int n_k, float softmax_scale) {
    SLA2_DYNAMIC_SHARED(shared);
    unsigned char* q_tile = shared;
    unsigned char* k_ring = shared + BLOCK_Q * HALF_ROW;
    unsigned char* v_ring = k_ring + 2 * KEY_BYTES;

    const int row_block = blockIdx.x, item = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const long long bh = blockIdx.y;
    const int first_row = row_block * BLOCK_Q, t_m = gridDim.x;
    const Selection selected = selection(indices, counts, max_selected, bh * t_m + row_block,
                                         valid_keys(kv_lengths, item, n_k));
    const PooledKeys pooled = pooled_keys(pooled_k, pooled_v, bits, selected, bh,
                                          bh * t_m + row_block, n_k);
    q += item * q_item + head * q_head + static_cast<long long>(first_row) * q_step;
    k += item * k_item + head * k_head;
    v += item * v_item + head * v_head;

    float o[FWD_M_TILES][D_TILES][4];
    clear(o);
    OnlineSoftmax<FWD_M_TILES> softmax;
    softmax.init();
    // The first pooled tiles follow the last selected ones in their rings.
    const auto first_k = [&](unsigned char* slot) {
        if (EARLY_POOLED && pooled.tiles > 0) load_pooled(slot, pooled.k, pooled, 0);
    };
    const auto first_v = [&](unsigned char* slot) {
        if (EARLY_POOLED && pooled.tiles > 0) load_pooled(slot, pooled.v, pooled, 0);
    };
    attend_selected<SELECTED_UNROLL>(o, softmax, softmax_scale * LOG2_E, selected, q, q_step,
                                     n_q - first_row, k, k_step, v, v_step, q_tile, k_ring,
                                     v_ring, first_k, first_v);
    const int slot = selected.steps & 1;
    if (pooled.tiles > 0 && (!EARLY_POOLED || selected.steps == 0)) {
        if (selected.steps == 0)
            load_tile<BLOCK_Q, HALF_ROW, FWD_THREADS>(q_tile, q, 2 * q_step, n_q - first_row);
        load_pooled(k_ring + slot * KEY_BYTES, pooled.k, pooled, 0);
        cp_async_commit();
        load_pooled(v_ring + slot * KEY_BYTES, pooled.v, pooled, 0);
        cp_async_commit();
    }
    bias += item * bias_stride_b + head * bias_stride_h + row_block * bias_stride_row;
    const float whole = log_size(BLOCK_K, *bias, softmax_scale);
    float shift[FWD_M_TILES][2];  // of the row's scores by K's mean
    if (mean != nullptr && selected.steps > 0)
        row_products(shift, q_tile, mean + bh * HEAD_DIM, threadIdx.x / 32 * FWD_WARP_ROWS);
    else
#pragma unroll
        for (int m = 0; m < FWD_M_TILES; ++m) shift[m][0] = shift[m][1] = 0.0f;
#pragma unroll
    for (int m = 0; m < FWD_M_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) softmax.maximum[m][r] -= shift[m][r] + whole;
    attend_pooled(o, softmax, softmax_scale, pooled, q_tile, k_ring, v_ring, slot);
    store_joint(o, softmax, softmax_scale, whole, pooled.blocks > 0, q_tile,
                out + item * out_item + head * out_head, out_step, lse + bh * n_q, first_row, n_q);
}
