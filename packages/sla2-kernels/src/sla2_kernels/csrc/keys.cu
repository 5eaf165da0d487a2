// The second pass over K and V (keys.cuh), with linear states in 16 bit.
#include "keys.cuh"

// h_j / BLOCK_K and z_j / BLOCK_K, so that they stay within the range of V.
SLA2_INLINE void store_states(const unsigned char* phi_tile, const unsigned char* v_tile,
                              half_bits* target) {
    const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x & 31;
    float sums[8];
    sum_tokens(sums, phi_tile, row0);
    if (lane < 2)
        *reinterpret_cast<uint4*>(target + HEAD_DIM * HEAD_DIM + row0 + 8 * lane) =
            pack_chunk(sums);
    target += row0 * HEAD_DIM;
    multiply_tokens(phi_tile, v_tile, row0, [&](const float (&acc)[4][4], int column) {
        store_fragments(acc, SHARE, SHARE, target + column, HEAD_DIM, 16);
    });
}

// As make_keys says; states (B H, T_n, D (D + 1)), or null.
extern "C" __global__ void __launch_bounds__(KEYS_THREADS, KEYS_BLOCKS)
sla2_keys(const half_bits* __restrict__ k, long long k_item, long long k_head, int k_step,
          const half_bits* __restrict__ v, long long v_item, long long v_head, int v_step,
          const float* __restrict__ mean, const float* __restrict__ value_scale,
          const int* __restrict__ kv_lengths, half_bits* __restrict__ smooth,
          half_bits* __restrict__ states, unsigned char* __restrict__ k_bytes,
          float* __restrict__ k_scale, unsigned char* __restrict__ v_bytes,
          unsigned char* __restrict__ k_tiles, unsigned char* __restrict__ v_tiles, int num_heads,
          int n_k, int channels) {
    SLA2_DYNAMIC_SHARED(shared);
    const long long at = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x;
    const KeysArguments args = {k,          k_item,  k_head,    k_step,  v,
                                v_item,     v_head,  v_step,    mean,    value_scale,
                                kv_lengths, smooth,  k_bytes,   k_scale, v_bytes,
                                k_tiles,    v_tiles, num_heads, n_k,     channels};
    make_keys(args, states != nullptr, shared,
              [&](const unsigned char* phi_tile, const unsigned char* v_tile, float*) {
                  store_states(phi_tile, v_tile, states + at * STATE);
              });
}
