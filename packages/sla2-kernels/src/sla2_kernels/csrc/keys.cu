// The second pass over K, and the one over V: K less its mean, the linear states h_j = phi(K_j)^T
// V_j and z_j of each key block, 8-bit K and V. Strides as in pool.cu.
#include "block.cuh"
#include "sm90/offsets.cuh"
#include "tile.cuh"

constexpr int KEYS_THREADS = 2 * HEAD_DIM;        // a warp per 16 channels of phi
constexpr int KEYS_BLOCKS = 768 / KEYS_THREADS;   // on a multiprocessor: 85 registers for a thread

// V in 8 bit, transposed and permuted (formats.cuh), (D, BLOCK_K), row by row or as a tile for
// wgmma. A thread makes 16 keys of a channel at a time. (In low bit a block holds 32 or 64 keys, so
// the threads' shares are whole.)
SLA2_INLINE void store_values(const unsigned char* tile, const float* value_scale,
                              unsigned char* bytes, bool swizzled) {
    constexpr int SHARES = KEYS_THREADS / HEAD_DIM, GROUPS = BLOCK_K / 16 / SHARES;
    const int c = threadIdx.x % HEAD_DIM, share = threadIdx.x / HEAD_DIM;
    const Divisor by(value_scale[c]);
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
        const int group = share * GROUPS + i;
        unsigned words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            float x[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int key = 16 * group + permuted_key(4 * w + e);
                x[e] = by.divide(half_to_float(*reinterpret_cast<const half_bits*>(
                    tile + tile_offset<HALF_ROW>(key, c / 8) + c % 8 * 2)));
            }
            words[w] = pack_bytes<PV_FP8>(x[0], x[1], x[2], x[3]);
        }
        uint4 packed;
        packed.x = words[0], packed.y = words[1], packed.z = words[2], packed.w = words[3];
        const int at = swizzled ? byte_offset<BLOCK_K>(c, group) : c * BLOCK_K + 16 * group;
        *reinterpret_cast<uint4*>(bytes + at) = packed;
    }
}

// h_j / BLOCK_K and z_j / BLOCK_K, so that they stay within the range of V, from phi(K) and V, in
// which padding tokens are zeros.
SLA2_INLINE void store_states(const unsigned char* phi_tile, const unsigned char* v_tile,
                              half_bits* target) {
    const int row0 = threadIdx.x / 32 * 16;
    constexpr float SHARE = 1.0f / BLOCK_K;
    // z_j: a warp adds its 16 channels over the tokens, eight of them (16 bytes) in each of two
    // lanes that take every 16th token; chunks of a row lie where tile_offset says.
    const int lane = threadIdx.x & 31, half = lane & 1;
    float sums[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) sums[e] = 0.0f;
#pragma unroll
    for (int row = lane >> 1; row < BLOCK_K; row += 16) {
        float x[8];
        unpack_chunk(x, *reinterpret_cast<const uint4*>(
                            phi_tile + tile_offset<HALF_ROW>(row, row0 / 8 + half)));
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[e] += x[e];
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        for (int mask = 2; mask < 32; mask <<= 1) sums[e] += shfl_xor(sums[e], mask);
        sums[e] *= SHARE;
    }
    if (lane < 2)
        *reinterpret_cast<uint4*>(target + HEAD_DIM * HEAD_DIM + row0 + 8 * half) =
            pack_chunk(sums);
    // Rows of acc are channels of phi, columns channels of V, the depth is tokens: both tiles are
    // stored [token][channel], so both operands are read transposed. 32 columns at a time: few
    // registers, so that many blocks wait for memory at once.
    unsigned a[BLOCK_K / 16][4];
#pragma unroll
    for (int c = 0; c < BLOCK_K / 16; ++c) load_a_trans<HALF_ROW>(a[c], phi_tile, 16 * c, row0);
#pragma unroll 1
    for (int n = 0; n < D_TILES; n += 4) {
        float acc[4][4];
        clear(acc);
#pragma unroll
        for (int c = 0; c < BLOCK_K / 16; ++c)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                unsigned b[4];
                load_b_trans<HALF_ROW>(b, v_tile, 16 * c, 8 * (n + i));
                mma_half(acc[i], a[c], &b[0]);
                mma_half(acc[i + 1], a[c], &b[2]);
            }
        store_fragments(acc, SHARE, SHARE, target + row0 * HEAD_DIM + 8 * n, HEAD_DIM, 16);
    }
}

// Grid (T_n, B H). mean (B H, D) of K, or null for 0; value_scale (B H, D). Written, null where not
// wanted: smooth (B H, n_k, D), K - mean in 16 bit, from which everything else is made; states
// (B H, T_n, D (D + 1)) in 16 bit; in 8 bit also k_bytes (B H, n_k, D) with a scale a block
// (B H, T_n), and v_bytes (B H, T_n, D, BLOCK_K). Tokens past the valid ones come out as zeros.
// k_tiles and v_tiles (B H, T_n, a tile), in 8 bit in place of k_bytes and v_bytes: as sm90/pack.cu
// and sm90/pack_low.cu lay them out. Shared memory: phi(K) | V.
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
    __shared__ float tops[KEYS_THREADS / 32];
    unsigned char* phi_tile = shared;
    unsigned char* v_tile = shared + BLOCK_K * HALF_ROW;
    const long long bh = blockIdx.y, at = bh * gridDim.x + blockIdx.x;
    const int first = blockIdx.x * BLOCK_K, item = blockIdx.y / num_heads;
    const int head = blockIdx.y % num_heads, rows = n_k - first;
    const int valid = clamp_int(valid_keys(kv_lengths, item, n_k) - first, 0, BLOCK_K);
    if (LOW_BIT || states != nullptr || v_tiles != nullptr)
        load_tile<BLOCK_K, HALF_ROW, KEYS_THREADS>(
            v_tile, v + item * v_item + head * v_head + static_cast<long long>(first) * v_step,
            2 * v_step, valid);
    cp_async_commit();
    Block<BLOCK_K, KEYS_THREADS> keys;
    keys.load(k + item * k_item + head * k_head + static_cast<long long>(first) * k_step, k_step,
              rows);
    const int lane = threadIdx.x % ROW_LANES;
    if (mean != nullptr) {
        float shift[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) shift[e] = mean[bh * HEAD_DIM + 8 * lane + e];
#pragma unroll
        for (int pass = 0; pass < keys.PASSES; ++pass) {
            float x[8];
            unpack_chunk(x, keys.kept[pass]);
#pragma unroll
            for (int e = 0; e < 8; ++e) x[e] -= shift[e];
            keys.kept[pass] = pack_chunk(x);
        }
    }
    keys.cut(valid);
    if (smooth != nullptr)
#pragma unroll
        for (int pass = 0; pass < keys.PASSES; ++pass)
            if (keys.row(pass) < rows)
                *reinterpret_cast<uint4*>(smooth + (bh * n_k + first + keys.row(pass)) * HEAD_DIM +
                                          8 * lane) = keys.kept[pass];
    const bool tiled = k_tiles != nullptr;
    if (LOW_BIT && tiled)
        keys.store_bytes(tops, BLOCK_K, k_tiles + at * (BLOCK_K * HEAD_DIM), k_scale + at,
                         [](int row, int lane) {
                             return byte_offset<HEAD_DIM>(row, lane >> 1) + 8 * (lane & 1);
                         });
    else if (LOW_BIT)
        keys.store_bytes(tops, rows, k_bytes + (bh * n_k + first) * HEAD_DIM, k_scale + at);
    else if (tiled)
#pragma unroll
        for (int pass = 0; pass < keys.PASSES; ++pass)
            *reinterpret_cast<uint4*>(k_tiles + at * (BLOCK_K * HALF_ROW) +
                                      panel_offset<BLOCK_K>(keys.row(pass), lane)) =
                keys.kept[pass];
    if (states != nullptr) {
        const int inside = channels - 8 * lane;  // at least 8 but where heads are padded
#pragma unroll
        for (int pass = 0; pass < keys.PASSES; ++pass) {
            float x[8];
            unpack_chunk(x, keys.kept[pass]);
            softmax_of_lanes(x, inside);
            uint4 chunk = pack_chunk(x);
            if (keys.row(pass) >= valid) chunk.x = chunk.y = chunk.z = chunk.w = 0u;
            *reinterpret_cast<uint4*>(phi_tile +
                                      tile_offset<HALF_ROW>(keys.row(pass), lane)) = chunk;
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    if (LOW_BIT)
        store_values(v_tile, value_scale + bh * HEAD_DIM,
                     (tiled ? v_tiles : v_bytes) + at * BLOCK_K * HEAD_DIM, tiled);
    else if (tiled)
#pragma unroll
        for (int pass = 0; pass < keys.PASSES; ++pass)
            *reinterpret_cast<uint4*>(v_tiles + at * (BLOCK_K * HALF_ROW) +
                                      panel_offset<BLOCK_K>(keys.row(pass), lane)) =
                *reinterpret_cast<const uint4*>(v_tile +
                                                tile_offset<HALF_ROW>(keys.row(pass), lane));
    if (states != nullptr) store_states(phi_tile, v_tile, states + at * STATE);
}
