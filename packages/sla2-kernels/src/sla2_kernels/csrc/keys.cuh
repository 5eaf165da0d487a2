// The second pass over K, and the one over V: K less its mean, the linear states h_j = phi(K_j)^T
// V_j and z_j of each key block, 8-bit K and V. What keys.cu and keys_low.cu share.
#pragma once

#include "block.cuh"
#include "tile.cuh"

constexpr float SHARE = 1.0f / BLOCK_K;           // of a token in h_j and z_j
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

// z_j / BLOCK_K of the warp's channels row0 .. row0 + 15: even lanes get the first eight of them,
// odd lanes the others. Padding tokens of phi(K) and V are zeros.
SLA2_INLINE void sum_tokens(float (&sums)[8], const unsigned char* phi_tile, int row0) {
    // A warp adds its 16 channels over the tokens, eight of them (16 bytes) in each of two lanes
    // that take every 16th token; chunks of a row lie where tile_offset says.
    const int lane = threadIdx.x & 31, half = lane & 1;
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
}

// phi(K)^T V of the warp's channels of phi, 32 channels of V at a time from `column` on: few
// registers, so that many blocks wait for memory at once.
template <class Store>
SLA2_INLINE void multiply_tokens(const unsigned char* phi_tile, const unsigned char* v_tile,
                                 int row0, Store store) {
    // Rows of acc are channels of phi, columns channels of V, the depth is tokens: both tiles are
    // stored [token][channel], so both operands are read transposed.
    unsigned a[BLOCK_K / 16][4];
#pragma unroll
    for (int c = 0; c < BLOCK_K / 16; ++c) load_a_trans<HALF_ROW>(a[c], phi_tile, 16 * c, row0);
#pragma unroll 1
    for (int column = 0; column < HEAD_DIM; column += 32) {
        float acc[4][4];
        clear(acc);
#pragma unroll
        for (int c = 0; c < BLOCK_K / 16; ++c)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                unsigned b[4];
                load_b_trans<HALF_ROW>(b, v_tile, 16 * c, column + 8 * i);
                mma_half(acc[i], a[c], &b[0]);
                mma_half(acc[i + 1], a[c], &b[2]);
            }
        store(acc, column);
    }
}

// What both kernels list, beside the states. k and v: strides as in pool.cu; mean (B H, D) of K, or
// null for 0; value_scale (B H, D). Written, null where not wanted: smooth (B H, n_k, D), K - mean
// in 16 bit, from which everything else is made; in 8 bit also k_bytes (B H, n_k, D) with a scale a
// block (B H, T_n), and v_bytes (B H, T_n, D, BLOCK_K). k_tiles and v_tiles (B H, T_n, a tile), in
// 8 bit in place of k_bytes and v_bytes: as sm90/pack.cu and sm90/pack_low.cu lay them out.
struct KeysArguments {
    const half_bits* k;
    long long k_item, k_head;
    int k_step;
    const half_bits* v;
    long long v_item, v_head;
    int v_step;
    const float* mean;
    const float* value_scale;
    const int* kv_lengths;
    half_bits* smooth;
    unsigned char* k_bytes;
    float* k_scale;
    unsigned char* v_bytes;
    unsigned char* k_tiles;
    unsigned char* v_tiles;
    int num_heads, n_k, channels;
};

// Grid (T_n, B H). Tokens past the valid ones come out as zeros. Shared memory: phi(K) | V, of
// which, if `linear`, store(phi_tile, v_tile, tops) makes the states; `tops` has a float a warp.
template <class Store>
SLA2_INLINE void make_keys(const KeysArguments& a, bool linear, unsigned char* shared,
                           Store store) {
    __shared__ float tops[KEYS_THREADS / 32];
    unsigned char* phi_tile = shared;
    unsigned char* v_tile = shared + BLOCK_K * HALF_ROW;
    const long long bh = blockIdx.y, at = bh * gridDim.x + blockIdx.x;
    const int first = blockIdx.x * BLOCK_K, item = blockIdx.y / a.num_heads;
    const int head = blockIdx.y % a.num_heads, rows = a.n_k - first;
    const int valid = clamp_int(valid_keys(a.kv_lengths, item, a.n_k) - first, 0, BLOCK_K);
    if (LOW_BIT || linear || a.v_tiles != nullptr)
        load_tile<BLOCK_K, HALF_ROW, KEYS_THREADS>(
            v_tile,
            a.v + item * a.v_item + head * a.v_head + static_cast<long long>(first) * a.v_step,
            2 * a.v_step, valid);
    cp_async_commit();
    Block<BLOCK_K, KEYS_THREADS> keys;
    keys.load(a.k + item * a.k_item + head * a.k_head + static_cast<long long>(first) * a.k_step,
              a.k_step, rows);
    const int lane = threadIdx.x % ROW_LANES;
    if (a.mean != nullptr) {
        float shift[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) shift[e] = a.mean[bh * HEAD_DIM + 8 * lane + e];
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
    if (a.smooth != nullptr)
#pragma unroll
        for (int pass = 0; pass < keys.PASSES; ++pass)
            if (keys.row(pass) < rows)
                *reinterpret_cast<uint4*>(
                    a.smooth + (bh * a.n_k + first + keys.row(pass)) * HEAD_DIM + 8 * lane) =
                    keys.kept[pass];
    const bool tiled = a.k_tiles != nullptr;
    if (LOW_BIT) {
        // A tile's swizzle repeats every 8 rows, and a thread's rows are 16 apart.
        static_assert(keys.GROUPS % 8 == 0, "a thread's rows are swizzled alike");
        const int row = keys.row(0);
        const int swizzled = byte_offset<HEAD_DIM>(row, lane >> 1) + 8 * (lane & 1);
        keys.store_bytes(tops, tiled ? BLOCK_K : rows,
                         tiled ? a.k_tiles + at * (BLOCK_K * HEAD_DIM)
                               : a.k_bytes + (bh * a.n_k + first) * HEAD_DIM,
                         a.k_scale + at, tiled ? swizzled : row * HEAD_DIM + 8 * lane);
    } else if (tiled)
        keys.store_tile(a.k_tiles + at * (BLOCK_K * HALF_ROW));
    if (linear) {
        const int inside = a.channels - 8 * lane;  // at least 8 but where heads are padded
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
        store_values(v_tile, a.value_scale + bh * HEAD_DIM,
                     (tiled ? a.v_tiles : a.v_bytes) + at * BLOCK_K * HEAD_DIM, tiled);
    else if (tiled)
#pragma unroll
        for (int pass = 0; pass < keys.PASSES; ++pass)
            *reinterpret_cast<uint4*>(a.v_tiles + at * (BLOCK_K * HALF_ROW) +
                                      panel_offset<BLOCK_K>(keys.row(pass), lane)) =
                *reinterpret_cast<const uint4*>(v_tile +
                                                tile_offset<HALF_ROW>(keys.row(pass), lane));
    if (linear) store(phi_tile, v_tile, tops);
}
