// dK and dV of the block-sparse branch on Hopper: the formulas of ../sparse_bwd.cu with wgmma.
#include "columns.cuh"
#include "sm90/rows.cuh"

constexpr int STAGES = 2, KEY_STAGES = 2;
constexpr int D_WORDS = HEAD_DIM / 2;
constexpr int ROW_TILE = 64 * HALF_ROW;  // of Q or dO: what a warpgroup has of a query block

// Shared memory, in bytes; tiles of wgmma begin at multiples of 1024. A stage of keys is K and V, a
// stage of rows the Q tiles of both warpgroups and their dO tiles.
constexpr int KEY_STAGE = 2 * KEY_BYTES, ROW_STAGE = 4 * ROW_TILE;
constexpr int KEYS_AT = 0;
constexpr int ROWS_AT = KEYS_AT + KEY_STAGES * KEY_STAGE;
constexpr int VALUES_AT = ROWS_AT + STAGES * ROW_STAGE;  // [stage][L, row_mean][BLOCK_Q] floats
constexpr int SUMS_AT = VALUES_AT + STAGES * 2 * BLOCK_Q * 4;  // [warp][D] floats
constexpr int BARRIERS_AT = SUMS_AT + 4 * HEAD_DIM * 4;
static_assert(KEY_STAGE >= 64 * HEAD_DIM * 4, "sums of one matrix take the place of K and V");

struct Barriers {
    unsigned long long keys_full[KEY_STAGES], keys_empty[KEY_STAGES];
    unsigned long long rows_full[STAGES], rows_empty[STAGES];
};

// A part of dK and dV, as all warps see it.
struct Column {
    Part part;
    int item, head;
    int valid;  // keys that count
    int steps;
};

SLA2_INLINE Column column_of(const ColumnMap& map, int number, const int* kv_lengths, int num_heads,
                             int n_k) {
    Column w;
    w.part = part_of(map, number);
    w.item = static_cast<int>(w.part.bh) / num_heads;
    w.head = static_cast<int>(w.part.bh) % num_heads;
    w.valid = 0, w.steps = 0;
    if (w.part.column < 0) return w;
    const int length = valid_keys(kv_lengths, w.item, n_k);
    w.valid = clamp_int(length - w.part.column * BLOCK_K, 0, BLOCK_K);
    w.steps = w.valid > 0 && w.part.count > 0 ? w.part.count : 0;
    return w;
}

// x += the other warpgroup's, which the sums at `between` pass: a thread's words lie 128 apart.
SLA2_INLINE void give(const float (&x)[D_WORDS], float* between) {
#pragma unroll
    for (int i = 0; i < D_WORDS; ++i) between[128 * i + (threadIdx.x & 127)] = x[i];
}

SLA2_INLINE void take(float (&x)[D_WORDS], const float* between) {
#pragma unroll
    for (int i = 0; i < D_WORDS; ++i) x[i] += between[128 * i + (threadIdx.x & 127)];
}

// As sla2_sparse_bwd_kv, not after a low-bit forward ("matched"). Grid: at most one block a
// multiprocessor; 384 threads. A block of threads walks over the B H (slices + T_n) parts; each of
// its two consumer warpgroups takes its 64 rows of every query block, and their sums meet at the
// end. Tiles as in sla2_sm90_sparse_bwd_q.
extern "C" __global__ void __launch_bounds__(384, 1)
sla2_sm90_sparse_bwd_kv(const unsigned char* __restrict__ q_tiles,
                        const unsigned char* __restrict__ k_tiles,
                        const unsigned char* __restrict__ v_tiles,
                        const unsigned char* __restrict__ grad_tiles,
                        const float* __restrict__ lse, const float* __restrict__ row_mean,
                        const int* __restrict__ offsets, const int* __restrict__ column_rows,
                        long long capacity, const int* __restrict__ slice_offsets,
                        const int* __restrict__ slice_columns, int slices,
                        const int* __restrict__ kv_lengths,
                        const float* __restrict__ rest_inverse, const float* __restrict__ alpha,
                        int alpha_stride_b, int alpha_stride_h, int alpha_stride_row,
                        const float* rest_k, const float* __restrict__ rest_v,
                        float* d_k, half_bits* __restrict__ d_v, float* __restrict__ key_sum,
                        float* __restrict__ sliced, int pairs, int num_heads, int n_q, int n_k,
                        int by_block, float softmax_scale) {
    SLA2_ALIGNED_SHARED(shared);
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + BARRIERS_AT);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int t_m = ceil_div(n_q, BLOCK_Q), t_n = ceil_div(n_k, BLOCK_K);
    const ColumnMap map = {offsets,       column_rows, capacity, slice_offsets,
                           slice_columns, slices,      t_n,      pairs};
    const int parts = pairs * (slices + t_n);
    if (threadIdx.x == 0) {
        for (int i = 0; i < KEY_STAGES; ++i)
            mbarrier_init(&barriers.keys_full[i], 1), mbarrier_init(&barriers.keys_empty[i], 256);
        for (int i = 0; i < STAGES; ++i)  // filled by the copies and a warp's stores
            mbarrier_init(&barriers.rows_full[i], 33), mbarrier_init(&barriers.rows_empty[i], 8);
        fence_proxy_async();
    }
    __syncthreads();

    if (warp < 4) {
        setmaxnreg_dec<40>();
        Turn<STAGES> turn;
        Turn<KEY_STAGES> key_turn;
        if (warp == 0 && elect_one()) {  // tiles
            for (int number = blockIdx.x; number < parts; number += gridDim.x) {
                const Column w = column_of(map, number, kv_lengths, num_heads, n_k);
                if (w.steps == 0) continue;
                unsigned long long* full = &barriers.keys_full[key_turn.stage];
                unsigned char* keys = shared + KEYS_AT + key_turn.stage * KEY_STAGE;
                const long long key_at = (w.part.bh * t_n + w.part.column) * KEY_BYTES;
                mbarrier_wait(&barriers.keys_empty[key_turn.stage], key_turn.parity ^ 1);
                key_turn.next();
                mbarrier_arrive_expect(full, KEY_STAGE);
                bulk_load(keys, k_tiles + key_at, KEY_BYTES, full);
                bulk_load(keys + KEY_BYTES, v_tiles + key_at, KEY_BYTES, full);
                for (int step = 0; step < w.steps; ++step, turn.next()) {
                    const int first = w.part.list[step] * BLOCK_Q;
                    const int bytes = n_q - first > 64 ? 2 * ROW_TILE : ROW_TILE;
                    const long long at = (w.part.bh * ceil_div(n_q, 64) + first / 64) * ROW_TILE;
                    unsigned char* rows = shared + ROWS_AT + turn.stage * ROW_STAGE;
                    mbarrier_wait(&barriers.rows_empty[turn.stage], turn.parity ^ 1);
                    full = &barriers.rows_full[turn.stage];
                    mbarrier_arrive_expect(full, 2 * bytes);
                    bulk_load(rows, q_tiles + at, bytes, full);
                    bulk_load(rows + 2 * ROW_TILE, grad_tiles + at, bytes, full);
                }
            }
        } else if (warp == 1) {  // L and row_mean
            for (int number = blockIdx.x; number < parts; number += gridDim.x) {
                const Column w = column_of(map, number, kv_lengths, num_heads, n_k);
                for (int step = 0; step < w.steps; ++step, turn.next()) {
                    const int first = w.part.list[step] * BLOCK_Q;
                    float* values = reinterpret_cast<float*>(shared + VALUES_AT) +
                                    turn.stage * 2 * BLOCK_Q;
                    mbarrier_wait(&barriers.rows_empty[turn.stage], turn.parity ^ 1);
                    for (int i = lane; i < BLOCK_Q; i += 32) {
                        const long long at = w.part.bh * n_q + first + i;
                        values[i] = first + i < n_q ? lse[at] * LOG2_E : 0.0f;
                        values[BLOCK_Q + i] = first + i < n_q ? row_mean[at] : 0.0f;
                    }
                    mbarrier_arrive(&barriers.rows_full[turn.stage]);
                }
            }
        }
        return;
    }

    setmaxnreg_inc<232>();
    const int half = (warp - 4) / 4, g = lane >> 2, column = (lane & 3) * 2;
    const float scale = softmax_scale * LOG2_E;
    Turn<STAGES> turn;
    Turn<KEY_STAGES> key_turn;
    for (int number = blockIdx.x; number < parts; number += gridDim.x) {
        const Column w = column_of(map, number, kv_lengths, num_heads, n_k);
        if (w.part.column < 0) continue;
        if (w.part.count < 0) {
            const int c = threadIdx.x - 128;  // of the consumers
            if (c < HEAD_DIM) key_sum[sum_row(map, w.part) * HEAD_DIM + c] = 0.0f;
            continue;
        }
        const int alpha_of_head = w.item * alpha_stride_b + w.head * alpha_stride_h;
        float acc_k[D_WORDS], acc_v[D_WORDS];
#pragma unroll
        for (int i = 0; i < D_WORDS; ++i) acc_k[i] = acc_v[i] = 0.0f;
        if (w.steps > 0) {
            unsigned char* keys = shared + KEYS_AT + key_turn.stage * KEY_STAGE;
            mbarrier_wait(&barriers.keys_full[key_turn.stage], key_turn.parity);
            for (int step = 0; step < w.steps; ++step, turn.next()) {
                const int row_block = w.part.list[step];
                const float weight =
                    sparse_weight(alpha, alpha_of_head + row_block * alpha_stride_row, rest_inverse,
                                  w.part.bh * t_m + row_block, true);
                const unsigned char* rows =
                    shared + ROWS_AT + turn.stage * ROW_STAGE + half * ROW_TILE;
                const unsigned char* grad = rows + 2 * ROW_TILE;
                const float* values = reinterpret_cast<const float*>(shared + VALUES_AT) +
                                      turn.stage * 2 * BLOCK_Q + half * 64 + column;
                mbarrier_wait(&barriers.rows_full[turn.stage], turn.parity);
                if (row_block * BLOCK_Q + half * 64 < n_q) {
                    // Transposed, keys by queries: P^T and dS^T are A operands of dV and dK as they
                    // lie. A query row's L and row_mean go by columns here.
                    float p[32], d_p[32];
                    unsigned a_p[4][4], a_s[4][4];
                    wgmma_fence();
#pragma unroll
                    for (int c = 0; c < HEAD_DIM / 16; ++c)
                        wgmma_half_shared<K_MAJOR, K_MAJOR>(p, channels_of<BLOCK_K>(keys, c),
                                                            channels_of<64>(rows, c), c != 0);
                    wgmma_commit();
#pragma unroll
                    for (int c = 0; c < HEAD_DIM / 16; ++c)
                        wgmma_half_shared<K_MAJOR, K_MAJOR>(
                            d_p, channels_of<BLOCK_K>(keys + KEY_BYTES, c),
                            channels_of<64>(grad, c), c != 0);
                    wgmma_commit();
                    wgmma_wait<1>();  // the scores
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        const float2 l = *reinterpret_cast<const float2*>(values + 8 * n);
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            p[4 * n + e] =
                                exp2_flushed(p[4 * n + e] * scale - (e & 1 ? l.y : l.x));
                    }
                    wgmma_wait<0>();  // dP
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        const float2 mean =
                            *reinterpret_cast<const float2*>(values + BLOCK_Q + 8 * n);
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            const int i = 4 * n + 2 * r;
                            const float x = p[i] * weight, y = p[i + 1] * weight;
                            a_p[n / 2][2 * (n & 1) + r] = pack_half(x, y);
                            a_s[n / 2][2 * (n & 1) + r] =
                                pack_half(x * (d_p[i] - mean.x), y * (d_p[i + 1] - mean.y));
                        }
                    }
                    wgmma_fence();
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        wgmma_half<MN_MAJOR>(acc_v, a_p[c], rows_of<64>(grad, c), 1);
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        wgmma_half<MN_MAJOR>(acc_k, a_s[c], rows_of<64>(rows, c), 1);
                    wgmma_commit();
                    wgmma_wait<0>();
                }
                __syncwarp();
                if (lane == 0) mbarrier_arrive(&barriers.rows_empty[turn.stage]);
            }
            // The first warpgroup ends with all of dK, the second with all of dV.
            float* between = reinterpret_cast<float*>(keys);
            named_barrier_sync(1, 256);  // nobody multiplies with K and V any more
            if (half == 1) give(acc_k, between);
            named_barrier_sync(1, 256);
            if (half == 0) take(acc_k, between), give(acc_v, between);
            named_barrier_sync(1, 256);
            if (half == 1) take(acc_v, between);
            fence_proxy_async();  // the next copy follows stores of threads
            mbarrier_arrive(&barriers.keys_empty[key_turn.stage]);
            key_turn.next();
        }
        const long long key_block = w.part.bh * t_n + w.part.column;
        const long long key_at = (w.part.bh * n_k + w.part.column * BLOCK_K) * HEAD_DIM + column;
        const long long rest_at = by_block ? key_block * HEAD_DIM + column : key_at;
        const int rest_step = by_block ? 0 : HEAD_DIM;
        const bool rest = rest_k != nullptr && w.part.first, whole = w.part.slice < 0;
        float* to_k = whole ? d_k + key_at : slice_sums(sliced, map, w.part) + column;
        const int row0 = 16 * (warp & 3), inside = n_k - w.part.column * BLOCK_K;
        if (half == 1) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = row0 + 8 * r + g, at = row * HEAD_DIM;
                if (row >= inside) continue;
#pragma unroll
                for (int n = 0; n < HEAD_DIM / 8; ++n) {
                    float2 y = {acc_v[4 * n + 2 * r], acc_v[4 * n + 2 * r + 1]};
                    if (rest) {
                        const float2 z = *reinterpret_cast<const float2*>(
                            rest_v + rest_at + row * rest_step + 8 * n);
                        y.x += z.x, y.y += z.y;
                    }
                    if (whole)
                        *reinterpret_cast<unsigned*>(d_v + key_at + at + 8 * n) =
                            row < w.valid ? pack_half(y.x, y.y) : 0u;
                    else
                        *reinterpret_cast<float2*>(to_k + BLOCK_K * HEAD_DIM + at + 8 * n) = y;
                }
            }
            continue;
        }
        float* sums = reinterpret_cast<float*>(shared + SUMS_AT);
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) {
            float below[2] = {0.0f, 0.0f};
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = row0 + 8 * r + g;
                if (row >= inside) continue;
                float2* at = reinterpret_cast<float2*>(to_k + row * HEAD_DIM + 8 * n);
                float2 x = {0.0f, 0.0f};
                if (row < w.valid) {
                    if (rest)
                        x = *reinterpret_cast<const float2*>(rest_k + rest_at + row * rest_step +
                                                             8 * n);
                    x.x += acc_k[4 * n + 2 * r] * softmax_scale;
                    x.y += acc_k[4 * n + 2 * r + 1] * softmax_scale;
                }
                *at = x;
                below[0] += x.x, below[1] += x.y;
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                // Over the eight g: lanes of one column differ in bits 2 to 4.
                for (int mask = 4; mask < 32; mask <<= 1) below[e] += shfl_xor(below[e], mask);
                if (g == 0) sums[(warp & 3) * HEAD_DIM + 8 * n + column + e] = below[e];
            }
        }
        named_barrier_sync(2, 128);
        const int c = threadIdx.x & 127;
        if (c < HEAD_DIM)
            key_sum[sum_row(map, w.part) * HEAD_DIM + c] =
                sums[c] + sums[HEAD_DIM + c] + sums[2 * HEAD_DIM + c] + sums[3 * HEAD_DIM + c];
        named_barrier_sync(2, 128);  // before the next key block's sums
    }
}
