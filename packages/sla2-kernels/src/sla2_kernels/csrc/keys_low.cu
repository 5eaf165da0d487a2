// The second pass over K and V (keys.cuh), with linear states in 8 bit.
#include "keys.cuh"
#include "states.cuh"

// h_j and z_j in 8 bit (states.cuh), and the block's weight; value_scale (D,). All threads call it;
// `tops` has a float a warp.
SLA2_INLINE void store_state_bytes(const unsigned char* phi_tile, const unsigned char* v_tile,
                                   const float* value_scale, float* tops, unsigned char* target,
                                   unsigned char* weight) {
    __shared__ float inverses[HEAD_DIM];  // of V's scales
    const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    if (threadIdx.x < HEAD_DIM) {
        const float scale = value_scale[threadIdx.x];
        // A channel of such numbers is as good as zero, and its inverse times 2^13 not finite.
        inverses[threadIdx.x] = scale < 0x1p-100f ? 0.0f : inverse_approx(scale);
    }
    float sums[8], top = 0.0f;
    sum_tokens(sums, phi_tile, row0);
#pragma unroll
    for (int e = 0; e < 8; ++e) top = max_nan(top, sums[e]);
    top = max_nan(top, shfl_xor(top, 1));
    if (lane == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    for (int w = 0; w < KEYS_THREADS / 32; ++w) top = max_nan(top, tops[w]);
    const int exponent = weight_exponent(top);
    const float over = power_of_two(-exponent);  // 1 / weight
    if (threadIdx.x == 0) *weight = weight_byte(exponent);
    if (lane < 2) {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float first[2], second[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float x = sums[2 * i + e] * (over * NORM_UNIT);
                first[e] = round_value<true>(x);
                second[e] = (x - first[e]) * NORM_STEP;
            }
            words[i] = pack_bytes<true>(first[0], second[0], first[1], second[1]);
        }
        uint4 packed;
        packed.x = words[0], packed.y = words[1], packed.z = words[2], packed.w = words[3];
        *reinterpret_cast<uint4*>(target + HEAD_DIM * HEAD_DIM + 2 * row0 + 16 * lane) = packed;
    }
    target += (row0 + g) * HEAD_DIM + 8 * q;
    multiply_tokens(phi_tile, v_tile, row0, [&](const float (&acc)[4][4], int column) {
        unsigned w[4];  // two columns of both rows; then of four tiles, lane q gets tile q's eight
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* inverse = inverses + column + 8 * i + 2 * q;
            const float left = inverse[0] * (over * SHARE), right = inverse[1] * (over * SHARE);
            w[i] = pack_bytes<true>(acc[i][0] * left, acc[i][1] * right, acc[i][2] * left,
                                    acc[i][3] * right);
        }
        quad_transpose(w);
        uint2 upper, lower;
        upper.x = __byte_perm(w[0], w[1], 0x5410), upper.y = __byte_perm(w[2], w[3], 0x5410);
        lower.x = __byte_perm(w[0], w[1], 0x7632), lower.y = __byte_perm(w[2], w[3], 0x7632);
        *reinterpret_cast<uint2*>(target + column) = upper;
        *reinterpret_cast<uint2*>(target + column + 8 * HEAD_DIM) = lower;
    });
}

// As make_keys says; states (B H, T_n, STATE_BYTES), with a weight a block
// (B H, padded_weights(T_n)). Neither is null, nor is value_scale.
extern "C" __global__ void __launch_bounds__(KEYS_THREADS, KEYS_BLOCKS)
sla2_keys_low(const half_bits* __restrict__ k, long long k_item, long long k_head, int k_step,
              const half_bits* __restrict__ v, long long v_item, long long v_head, int v_step,
              const float* __restrict__ mean, const float* __restrict__ value_scale,
              const int* __restrict__ kv_lengths, half_bits* __restrict__ smooth,
              unsigned char* __restrict__ states, unsigned char* __restrict__ weights,
              unsigned char* __restrict__ k_bytes, float* __restrict__ k_scale,
              unsigned char* __restrict__ v_bytes, unsigned char* __restrict__ k_tiles,
              unsigned char* __restrict__ v_tiles, int num_heads, int n_k, int channels) {
    SLA2_DYNAMIC_SHARED(shared);
    const KeysArguments args = {k,          k_item,  k_head,    k_step,  v,
                                v_item,     v_head,  v_step,    mean,    value_scale,
                                kv_lengths, smooth,  k_bytes,   k_scale, v_bytes,
                                k_tiles,    v_tiles, num_heads, n_k,     channels};
    make_keys(args, true, shared,
              [&](const unsigned char* phi_tile, const unsigned char* v_tile, float* tops) {
                  const long long bh = blockIdx.y, at = bh * gridDim.x + blockIdx.x;
                  const int padded = padded_weights(gridDim.x);
                  unsigned char* own = weights + bh * padded;
                  if (blockIdx.x == gridDim.x - 1)
                      for (int j = gridDim.x + threadIdx.x; j < padded; j += KEYS_THREADS)
                          own[weight_place(j)] = 0;
                  store_state_bytes(phi_tile, v_tile, value_scale + bh * HEAD_DIM, tops,
                                    states + at * STATE_BYTES, own + weight_place(blockIdx.x));
              });
}
