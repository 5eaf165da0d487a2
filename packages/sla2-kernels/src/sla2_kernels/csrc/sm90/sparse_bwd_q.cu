// dQ of the block-sparse branch on Hopper: the formulas of ../sparse_bwd.cu with wgmma; roles as in
// sparse_fwd.cu.
#include "sm90/rows.cuh"

constexpr int STAGES = 3;
constexpr int D_WORDS = HEAD_DIM / 2;
constexpr int ROW_TILE = 64 * HALF_ROW;  // of Q or dO: what a warpgroup has

// Shared memory, in bytes; tiles of wgmma begin at multiples of 1024.
constexpr int K_AT = 0;
constexpr int V_AT = K_AT + STAGES * KEY_BYTES;
constexpr int Q_AT = V_AT + STAGES * KEY_BYTES;
constexpr int GRAD_AT = Q_AT + 2 * ROW_TILE;
constexpr int OUT_AT = GRAD_AT + 2 * ROW_TILE;
constexpr int BARRIERS_AT = OUT_AT + BLOCK_Q * PITCH;

struct Barriers {
    unsigned long long k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    unsigned long long q_full, q_empty, grad_full, grad_empty;
};

// The A operand of the warp's 16 rows of a tile of 64.
SLA2_INLINE void load_rows(unsigned (&a)[HEAD_DIM / 16][4], const unsigned char* tile, int row0) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; ++c)
        ldmatrix_x4(a[c], tile + panel_offset<64>(row0 + (lane & 15), 2 * c + (lane >> 4)));
}

// As sla2_sparse_bwd_q, for whole query blocks and not after a low-bit forward ("matched"). Grid:
// at most one block a multiprocessor; 384 threads. Tiles of K, V (B H, T_n, BLOCK_K x D) and of Q,
// dO (B H, ceil(n_q / 64), 64 x D) come from sla2_sm90_pack; `blocks` = B H T_m query blocks.
extern "C" __global__ void __launch_bounds__(384, 1)
sla2_sm90_sparse_bwd_q(const unsigned char* __restrict__ q_tiles,
                       const unsigned char* __restrict__ k_tiles,
                       const unsigned char* __restrict__ v_tiles,
                       const unsigned char* __restrict__ grad_tiles,
                       const float* __restrict__ lse, const float* __restrict__ row_mean,
                       const int* __restrict__ indices, const int* __restrict__ counts,
                       int max_selected, const int* __restrict__ kv_lengths,
                       const float* __restrict__ rest_inverse, const float* __restrict__ alpha,
                       int alpha_stride_b, int alpha_stride_h, int alpha_stride_row,
                       const float* __restrict__ d_linear, half_bits* __restrict__ d_q,
                       int num_heads, int n_q, int n_k, int blocks, float softmax_scale) {
    SLA2_ALIGNED_SHARED(shared);
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + BARRIERS_AT);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int t_m = ceil_div(n_q, BLOCK_Q), t_n = ceil_div(n_k, BLOCK_K);
    if (threadIdx.x == 0) {
        init_key_rings<STAGES>(barriers);
        mbarrier_init(&barriers.q_full, 1), mbarrier_init(&barriers.q_empty, 8);
        mbarrier_init(&barriers.grad_full, 1), mbarrier_init(&barriers.grad_empty, 2);
        fence_proxy_async();
    }
    __syncthreads();

    if (warp < 4) {
        setmaxnreg_dec<40>();
        if (warp == 0 && elect_one()) {
            Turn<STAGES> turn;
            Turn<1> row_turn;
            for (int number = blockIdx.x; number < blocks; number += gridDim.x) {
                const Work w = work_of(number, indices, counts, max_selected, kv_lengths,
                                       num_heads, t_m, n_q, n_k);
                if (w.steps == 0) continue;
                const int bytes = w.rows > 64 ? 2 * ROW_TILE : ROW_TILE;
                const long long at =
                    (w.bh * ceil_div(n_q, 64) + w.row_block * (BLOCK_Q / 64)) * ROW_TILE;
                mbarrier_wait(&barriers.q_empty, row_turn.parity ^ 1);
                mbarrier_arrive_expect(&barriers.q_full, bytes);
                bulk_load(shared + Q_AT, q_tiles + at, bytes, &barriers.q_full);
                mbarrier_wait(&barriers.grad_empty, row_turn.parity ^ 1);
                mbarrier_arrive_expect(&barriers.grad_full, bytes);
                bulk_load(shared + GRAD_AT, grad_tiles + at, bytes, &barriers.grad_full);
                row_turn.next();
                bring_keys<KEY_BYTES, KEY_BYTES>(w, t_n, k_tiles, v_tiles, shared + K_AT,
                                                 shared + V_AT, barriers, turn);
            }
        }
        return;
    }

    setmaxnreg_inc<232>();
    const bool lead = (threadIdx.x & 127) == 0;  // of the warpgroup
    const int half = (warp - 4) / 4, row0 = 16 * (warp - 4), g = lane >> 2;
    const int column = (lane & 3) * 2;
    const float scale = softmax_scale * LOG2_E;
    Turn<STAGES> k_turn, v_turn;
    Turn<1> row_turn;
    for (int number = blockIdx.x; number < blocks; number += gridDim.x) {
        const Work w = work_of(number, indices, counts, max_selected, kv_lengths, num_heads, t_m,
                               n_q, n_k);
        const long long first_at = w.bh * n_q + w.first_row;
        float acc[D_WORDS];
#pragma unroll
        for (int i = 0; i < D_WORDS; ++i) acc[i] = 0.0f;
        if (w.steps > 0) {
            const int tail = w.length - w.list[w.steps - 1] * BLOCK_K;  // valid keys of the last
            const long long alpha_at = static_cast<long long>(w.item) * alpha_stride_b +
                                       w.head * alpha_stride_h + w.row_block * alpha_stride_row;
            // w, and 1 / sqrt(d) of dS -> dQ, go into one factor of dS.
            const float factor =
                softmax_scale * sparse_weight(alpha, alpha_at, rest_inverse, number, true);
            float l[2], mean[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = row0 + 8 * r + g;
                l[r] = row < w.rows ? lse[first_at + row] * LOG2_E : 0.0f;
                mean[r] = row < w.rows ? row_mean[first_at + row] : 0.0f;
            }
            unsigned a[HEAD_DIM / 16][4];
            mbarrier_wait(&barriers.q_full, row_turn.parity);
            load_rows(a, shared + Q_AT + half * ROW_TILE, row0 & 63);
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&barriers.q_empty);
            mbarrier_wait(&barriers.grad_full, row_turn.parity);
            row_turn.next();
            const unsigned char* grad = shared + GRAD_AT + half * ROW_TILE;

            float s[32], d_p[32];
            unsigned d_s[BLOCK_K / 16][4];
            int before = 0;  // the K stage of the step before
            for (int step = 0; step < w.steps; ++step) {
                const unsigned char* k_tile = shared + K_AT + k_turn.stage * KEY_BYTES;
                const unsigned char* v_tile = shared + V_AT + v_turn.stage * KEY_BYTES;
                mbarrier_wait(&barriers.k_full[k_turn.stage], k_turn.parity);
                mbarrier_wait(&barriers.v_full[v_turn.stage], v_turn.parity);
                wgmma_fence();
#pragma unroll
                for (int c = 0; c < HEAD_DIM / 16; ++c)
                    wgmma_half<K_MAJOR>(s, a[c], channels_of<BLOCK_K>(k_tile, c), c != 0);
                wgmma_commit();
#pragma unroll
                for (int c = 0; c < HEAD_DIM / 16; ++c)
                    wgmma_half_shared<K_MAJOR, K_MAJOR>(d_p, channels_of<64>(grad, c),
                                                        channels_of<BLOCK_K>(v_tile, c), c != 0);
                wgmma_commit();
                wgmma_wait<1>();  // the scores, and dQ of the step before
                if (lead && step > 0) mbarrier_arrive(&barriers.k_empty[before]);
                if (step + 1 == w.steps && tail < BLOCK_K) mask_keys(s, tail);
#pragma unroll
                for (int i = 0; i < 32; ++i) s[i] = exp2_flushed(s[i] * scale - l[i >> 1 & 1]);
                wgmma_wait<0>();  // dP
                if (lead) mbarrier_arrive(&barriers.v_empty[v_turn.stage]);
                v_turn.next();
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    s[i] *= (d_p[i] - mean[i >> 1 & 1]) * factor;
                pack_operand(d_s, s);
                wgmma_fence();
#pragma unroll
                for (int c = 0; c < BLOCK_K / 16; ++c)
                    wgmma_half<MN_MAJOR>(acc, d_s[c], rows_of<BLOCK_K>(k_tile, c), 1);
                wgmma_commit();
                before = k_turn.stage;
                k_turn.next();
            }
            wgmma_wait<0>();
            if (lead) mbarrier_arrive(&barriers.k_empty[before]);
            if (lead) mbarrier_arrive(&barriers.grad_empty);
        }
        if (d_linear != nullptr)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = row0 + 8 * r + g;
                if (row >= w.rows) continue;
                const float* rest = d_linear + (first_at + row) * HEAD_DIM + column;
#pragma unroll
                for (int n = 0; n < HEAD_DIM / 8; ++n) {
                    const float2 x = *reinterpret_cast<const float2*>(rest + 8 * n);
                    acc[4 * n + 2 * r] += x.x, acc[4 * n + 2 * r + 1] += x.y;
                }
            }
        store_warp_rows(acc, shared + OUT_AT, d_q + first_at * HEAD_DIM, HEAD_DIM, row0, w.rows);
    }
}
