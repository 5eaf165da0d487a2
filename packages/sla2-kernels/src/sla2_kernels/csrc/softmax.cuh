// Online softmax on mma accumulators: running row maximum and sum, rescaled only when the maximum
// moves.
#pragma once

#include "common.cuh"

// State of 16 M_TILES rows of a warp: a lane holds rows g and g + 8 of each 16-row tile,
// g = lane / 4, and shares them with the three other lanes of its quad. `sum` is the lane's own
// part until finish().
template <int M_TILES>
struct OnlineSoftmax {
    float maximum[M_TILES][2];  // in units of the unscaled scores
    float sum[M_TILES][2];

    __device__ __forceinline__ void init() {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) maximum[m][r] = MINUS_INFINITY, sum[m][r] = 0.0f;
    }

    // Turns raw scores s into P = 2^(scale (s - maximum)), adds their row sums, and rescales `out`
    // and the sums if the maximum of any row of the warp moves up by more than `slack` in log2
    // (then P <= 2^slack). The result after normalisation depends on neither. NaN
    // scores give NaN weights: fmaxf skips them, exp2 does not.
    template <int N_TILES, int OUT_TILES>
    __device__ __forceinline__ void update(float (&s)[M_TILES][N_TILES][4],
                                           float (&out)[M_TILES][OUT_TILES][4], float scale,
                                           float slack) {
        float top[M_TILES][2];
        bool moved = false;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {  // elements 2 r and 2 r + 1 of a tile lie in row g + 8 r
                float t = maximum[m][r];
#pragma unroll
                for (int n = 0; n < N_TILES; ++n)
                    t = fmaxf(t, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                top[m][r] = quad_max(t);
                moved = moved || (top[m][r] - maximum[m][r]) * scale > slack;
            }
        // Voted on by the warp, so that its lanes take one branch: most steps rescale nothing.
        if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    // Equal maxima, -inf included, keep what is there.
                    const float keep = top[m][r] == maximum[m][r]
                                           ? 1.0f
                                           : exp2_approx((maximum[m][r] - top[m][r]) * scale);
                    maximum[m][r] = top[m][r];
                    sum[m][r] *= keep;
#pragma unroll
                    for (int n = 0; n < OUT_TILES; ++n)
                        out[m][n][2 * r] *= keep, out[m][n][2 * r + 1] *= keep;
                }
        }
        float shift[M_TILES][2];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) shift[m][r] = maximum[m][r] * scale;
        exponentiate(s, scale, shift);
    }

    // The same without slack, P in [0, 2^unit], for scores (s - bias) factor, factor > 0. Maxima
    // move in most steps then, so no branch asks: `keep` says what is left of the caller's sums of
    // P V, by rows. `bias` is not subtracted from each score but goes into the exponent's shift,
    // which rounds it by less than one unit of s.
    template <int N_TILES>
    __device__ __forceinline__ void update_low(float (&s)[M_TILES][N_TILES][4],
                                               float (&keep)[M_TILES][2], float scale,
                                               float factor, float bias, float unit) {
        float shift[M_TILES][2];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float t = MINUS_INFINITY;
#pragma unroll
                for (int n = 0; n < N_TILES; ++n)
                    t = fmaxf(t, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                const float before = maximum[m][r];
                const float top = fmaxf(before, (quad_max(t) - bias) * factor);
                keep[m][r] = top == before ? 1.0f : exp2_approx((before - top) * scale);
                maximum[m][r] = top;
                sum[m][r] *= keep[m][r];
                shift[m][r] = __fmaf_rn(bias, scale * factor, top * scale - unit);
            }
        exponentiate(s, scale * factor, shift);
    }

    // s = 2^(s scale - shift), one FMA and one ex2, added to the row sums.
    template <int N_TILES>
    __device__ __forceinline__ void exponentiate(float (&s)[M_TILES][N_TILES][4], float scale,
                                                 const float (&shift)[M_TILES][2]) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float total = 0.0f;
#pragma unroll
                for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; ++e) {
                        s[m][n][e] = exp2_approx(s[m][n][e] * scale - shift[m][r]);
                        total += s[m][n][e];
                    }
                sum[m][r] += total;
            }
    }

    // Completes the row sums over the quad.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) sum[m][r] = quad_sum(sum[m][r]);
    }
};

// Scores of key columns at or past `valid` (counted from the tile's first key) become -inf.
template <int M_TILES, int N_TILES>
SLA2_INLINE void mask_tail(float (&s)[M_TILES][N_TILES][4], int valid) {
    const int column = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (8 * n + column + (e & 1) >= valid) s[m][n][e] = MINUS_INFINITY;
}
