// What a warp of a consumer warpgroup does with its 16 rows: softmax of scores whose product with V
// is still running, phi(Q) from the fragments of Q, stores. Accumulators are flat: element e of
// column tile n is x[4 n + e], in row g + 8 (e / 2), g = lane / 4 (../README.md, "Fragments").
#pragma once

#include "softmax.cuh"
#include "sm90/pipeline.cuh"

constexpr int PITCH = HALF_ROW + 16;  // bytes of a row that ldmatrix reads without conflicts

// Scores as the tiles of one 16-row product.
SLA2_INLINE float (&tiles_of(float (&s)[32]))[1][8][4] {
    return reinterpret_cast<float (&)[1][8][4]>(s);
}

// Turns raw scores into P as OnlineSoftmax::update does. `keep` says by what the caller has to
// multiply its sums of P V, which may be in flight; false: by nothing.
SLA2_INLINE bool next_weights(OnlineSoftmax<1>& softmax, float (&s)[32], float (&keep)[2],
                              float scale, float slack) {
    float top[2], shift[1][2];
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float t = softmax.maximum[0][r];
#pragma unroll
        for (int n = 0; n < 8; ++n) t = fmaxf(t, fmaxf(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]));
        top[r] = quad_max(t);
        moved = moved || (top[r] - softmax.maximum[0][r]) * scale > slack;
        keep[r] = 1.0f;
    }
    moved = __any_sync(0xffffffffu, moved);
    if (moved) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // Equal maxima, -inf included, keep what is there.
            if (top[r] != softmax.maximum[0][r])
                keep[r] = exp2_approx((softmax.maximum[0][r] - top[r]) * scale);
            softmax.maximum[0][r] = top[r];
            softmax.sum[0][r] *= keep[r];
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) shift[0][r] = softmax.maximum[0][r] * scale;
    softmax.exponentiate(tiles_of(s), scale, shift);
    return moved;
}

// Row r of each lane's two times by[r].
template <int WORDS>
SLA2_INLINE void scale_rows(float (&x)[WORDS], float by0, float by1) {
#pragma unroll
    for (int n = 0; n < WORDS / 4; ++n)
        x[4 * n] *= by0, x[4 * n + 1] *= by0, x[4 * n + 2] *= by1, x[4 * n + 3] *= by1;
}

// Scores of keys at or past `valid`, counted from the tile's first, become -inf.
SLA2_INLINE void mask_keys(float (&s)[32], int valid) {
    const int column = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (8 * n + column + (e & 1) >= valid) s[4 * n + e] = MINUS_INFINITY;
}

// The accumulators of two 8-key tiles are the A operand of 16 keys, as they lie.
SLA2_INLINE void pack_operand(unsigned (&p)[BLOCK_K / 16][4], const float (&s)[32]) {
#pragma unroll
    for (int c = 0; c < BLOCK_K / 16; ++c)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int e = 8 * c + 4 * (r >> 1) + 2 * (r & 1);
            p[c][r] = pack_half(s[e], s[e + 1]);
        }
}

// The A operand of Q becomes share phi(q) / (phi(q) . Z), with phi the softmax over the first
// `channels` channels, whose own sum cancels. Rows without a denominator become zeros.
SLA2_INLINE void linear_weights(unsigned (&a)[HEAD_DIM / 16][4], const float* norm, int channels,
                                float share) {
    const int column = (threadIdx.x & 3) * 2;
    float top[2] = {MINUS_INFINITY, MINUS_INFINITY}, below[2] = {0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; ++c)
#pragma unroll
        for (int r = 0; r < 4; ++r) {  // register r: row g + 8 (r & 1), half r >> 1 of 16 channels
            const int channel = 16 * c + 8 * (r >> 1) + column;
            if (channel < channels) top[r & 1] = fmaxf(top[r & 1], low_half(a[c][r]));
            if (channel + 1 < channels) top[r & 1] = fmaxf(top[r & 1], high_half(a[c][r]));
        }
    top[0] = quad_max(top[0]), top[1] = quad_max(top[1]);
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; ++c)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int channel = 16 * c + 8 * (r >> 1) + column;
            const float2 z = *reinterpret_cast<const float2*>(norm + channel);
            const float x = exp2_approx((low_half(a[c][r]) - top[r & 1]) * LOG2_E);
            const float y = exp2_approx((high_half(a[c][r]) - top[r & 1]) * LOG2_E);
            a[c][r] = pack_half(channel < channels ? x : 0.0f, channel + 1 < channels ? y : 0.0f);
            below[r & 1] += low_half(a[c][r]) * z.x + high_half(a[c][r]) * z.y;
        }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        below[r] = quad_sum(below[r]);
        below[r] = below[r] == 0.0f ? 0.0f : share / below[r];
    }
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; ++c)
#pragma unroll
        for (int r = 0; r < 4; ++r)
            a[c][r] =
                pack_half(low_half(a[c][r]) * below[r & 1], high_half(a[c][r]) * below[r & 1]);
}

// The A operand of the warp's 16 rows of Q, 16 bit, from rows PITCH apart.
SLA2_INLINE void load_q(unsigned (&a)[HEAD_DIM / 16][4], const unsigned char* rows, int row0) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; ++c)
        ldmatrix_x4(a[c], rows + (row0 + (lane & 15)) * PITCH + 16 * (2 * c + (lane >> 4)));
}

// Products q . x of the warp's rows, as lane rows g and g + 8; x (D).
SLA2_INLINE void row_products(float (&products)[2], const unsigned (&a)[HEAD_DIM / 16][4],
                              const float* x) {
    const int column = (threadIdx.x & 3) * 2;
    products[0] = products[1] = 0.0f;
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; ++c)
#pragma unroll
        for (int r = 0; r < 4; ++r) {  // as in linear_weights
            const float2 by =
                *reinterpret_cast<const float2*>(x + 16 * c + 8 * (r >> 1) + column);
            products[r & 1] += low_half(a[c][r]) * by.x + high_half(a[c][r]) * by.y;
        }
    products[0] = quad_sum(products[0]), products[1] = quad_sum(products[1]);
}

// o += share phi(Q) H / (phi(Q) . Z), of Q's fragments, which become phi(Q).
SLA2_INLINE void add_linear(float (&o)[HEAD_DIM / 2], unsigned (&a)[HEAD_DIM / 16][4],
                            const unsigned char* state_tile, const float* norm, int channels,
                            float share) {
    linear_weights(a, norm, channels, share);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; ++c)
        wgmma_half<MN_MAJOR>(o, a[c], rows_of<HEAD_DIM>(state_tile, c), 1);
    wgmma_commit();
    wgmma_wait<0>();
}

// Ends the softmax: o becomes O_s, L is stored to lse (of the query block's rows). `log_unit` is
// the natural logarithm of the unit in which the sums count.
SLA2_INLINE void finish_rows(float (&o)[HEAD_DIM / 2], OnlineSoftmax<1>& softmax, bool some,
                             float softmax_scale, float log_unit, float* lse, int row0, int rows) {
    const int lane = threadIdx.x & 31;
    softmax.finish();
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = softmax.sum[0][r];
        const int row = row0 + 8 * r + (lane >> 2);
        inverse[r] = some ? 1.0f / sum : 0.0f;
        if (row < rows && (lane & 3) == 0)
            lse[row] = some ? softmax.maximum[0][r] * softmax_scale + logf(sum) - log_unit
                            : MINUS_INFINITY;
    }
    scale_rows(o, inverse[0], inverse[1]);
}

// The warp's rows, from row0 of the query block, in 16 bit: through its own rows of `staging` to
// `target` (rows, D), rows step apart, 16 bytes a lane.
SLA2_INLINE void store_warp_rows(const float (&o)[HEAD_DIM / 2], unsigned char* staging,
                                 half_bits* target, int step, int row0, int rows) {
    const int lane = threadIdx.x & 31, g = lane >> 2, column = (lane & 3) * 2;
    __syncwarp();  // the warp has read what it stored here before
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n)
            *reinterpret_cast<unsigned*>(staging + (row0 + 8 * r + g) * PITCH + 16 * n +
                                         2 * column) =
                pack_half(o[4 * n + 2 * r], o[4 * n + 2 * r + 1]);
    __syncwarp();
    for (int i = lane; i < 16 * HALF_CHUNKS; i += 32) {
        const int row = row0 + i / HALF_CHUNKS, chunk = i % HALF_CHUNKS;
        if (row < rows)
            reinterpret_cast<uint4*>(target + static_cast<long long>(row) * step)[chunk] =
                *reinterpret_cast<const uint4*>(staging + row * PITCH + 16 * chunk);
    }
}

// What a query block ends with: where O, O_s (null: nowhere) and L go, and alpha.
struct Results {
    half_bits* out;
    long long out_item, out_head;
    int out_step;
    half_bits* out_sparse;
    float* lse;
    const float* alpha;
    int alpha_stride_b, alpha_stride_h, alpha_stride_row;
    int n_q, channels;
};

// Ends a query block: O_s and L, with `some` keys in its softmax, and with `linear` the product
// with H at `state_tile` and the mixture. `q` are the fragments of Q, read with `linear` alone.
template <class Barriers>
SLA2_INLINE void mix_and_store(const Results& to, const Work& w, bool some,
                               float (&o)[HEAD_DIM / 2],
                               OnlineSoftmax<1>& softmax, float softmax_scale, float log_unit,
                               bool linear, unsigned (&q)[HEAD_DIM / 16][4],
                               const unsigned char* state_tile, const float* norm,
                               unsigned char* staging, int row0, Barriers& barriers,
                               Turn<1>& state_turn) {
    const long long first_at = w.bh * to.n_q + w.first_row;
    finish_rows(o, softmax, some, softmax_scale, log_unit, to.lse + first_at, row0, w.rows);
    if (to.out_sparse != nullptr)
        store_warp_rows(o, staging, to.out_sparse + first_at * HEAD_DIM, HEAD_DIM, row0, w.rows);
    if (linear) {
        const float weight = some ? to.alpha[w.item * to.alpha_stride_b +
                                             w.head * to.alpha_stride_h +
                                             w.row_block * to.alpha_stride_row]
                                  : 0.0f;
        scale_rows(o, weight, weight);
        mbarrier_wait(&barriers.state_full, state_turn.parity);
        state_turn.next();
        add_linear(o, q, state_tile, norm, to.channels, 1.0f - weight);
        __syncwarp();
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(&barriers.state_empty);
    }
    store_warp_rows(o, staging,
                    to.out + w.item * to.out_item + w.head * to.out_head +
                        static_cast<long long>(w.first_row) * to.out_step,
                    to.out_step, row0, w.rows);
}
