// The 8-bit formats of a precision, as sla2_core.formats defines them: scale max|x| / limit
// (1 if the maximum is 0).
#pragma once

#include "common.cuh"

constexpr bool LOW_BIT = SLA2_PRECISION != 0;
constexpr bool QK_FP8 = SLA2_PRECISION == 3;
constexpr bool PV_FP8 = SLA2_PRECISION == 1 || SLA2_PRECISION == 3;
constexpr float QK_LIMIT = QK_FP8 ? 448.0f : 127.0f;
constexpr float PV_LIMIT = PV_FP8 ? 448.0f : 127.0f;
constexpr float LOG2_PV_LIMIT = PV_FP8 ? 8.807354922057604f : 6.988684686772166f;

// maximum, a 16-bit value, / limit, a constant, as IEEE rounds it: the remainder corrects maximum
// (1 / limit). NaN and inf maxima give NaN and inf scales, so that they show in everything that the
// scale touches.
SLA2_INLINE float scale_of(float maximum, float limit) {
    const float inverse = 1.0f / limit, quotient = maximum * inverse;
    const float remainder = __fmaf_rn(-quotient, limit, maximum);
    if (maximum == 0.0f) return 1.0f;
    return remainder == remainder ? __fmaf_rn(remainder, inverse, quotient) : quotient;
}

// x / divisor for many x: as exact as a division once the quotient is rounded to 8 bits, in four
// instructions. x (1 / divisor) alone may fall on the wrong side of a tie; its remainder corrects
// it, and the inverse's own last bit. A small divisor and x are lifted, so that neither 1 / divisor
// nor the remainder leaves fp32.
struct Divisor {
    float inverse, divisor, lift;
    __device__ __forceinline__ explicit Divisor(float by) {
        lift = by < 0x1p-64f ? 0x1p64f : 1.0f;
        inverse = inverse_approx(by * lift);
        divisor = inverse == 0.0f ? 0.0f : by * lift;  // x / inf = 0, where the remainder is NaN
    }
    __device__ __forceinline__ float divide(float x) const {
        x *= lift;
        const float quotient = x * inverse;
        return __fmaf_rn(__fmaf_rn(-quotient, divisor, x), inverse, quotient);
    }
};

// The nearest integer of x in bits 0-7, for |x| < 128: an fp32 number of this size has its lowest
// bit at 1. A NaN comes out as some integer, and is not lost: the block's scale or, for P, the row
// sum has it.
SLA2_INLINE unsigned round_int8(float x) { return __float_as_uint(x + 12582912.0f); }

// Four values, already divided by their scales, as four bytes; the first in bits 0-7.
template <bool FP8>
SLA2_INLINE unsigned pack_bytes(float a, float b, float c, float d) {
#if SLA2_ARCH >= 89
    if (FP8) return cvt_e4m3x2(a, b) | static_cast<unsigned>(cvt_e4m3x2(c, d)) << 16;
#endif
    const unsigned low = __byte_perm(round_int8(a), round_int8(b), 0x0040);
    return __byte_perm(low, __byte_perm(round_int8(c), round_int8(d), 0x0040), 0x5410);
}

// Eight 16-bit values over their scale, as bytes.
SLA2_INLINE uint2 quantized_chunk(uint4 raw, const Divisor& by) {
    float x[8];
    unpack_chunk(x, raw);
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = by.divide(x[e]);
    uint2 packed;
    packed.x = pack_bytes<QK_FP8>(x[0], x[1], x[2], x[3]);
    packed.y = pack_bytes<QK_FP8>(x[4], x[5], x[6], x[7]);
    return packed;
}

// x, already divided by its scale, as the nearest value of the format; NaN stays NaN.
template <bool FP8>
SLA2_INLINE float round_value(float x) {
#if SLA2_ARCH >= 89
    if (FP8) return e4m3_to_f32(static_cast<unsigned char>(cvt_e4m3x2(x, 0.0f) & 0xff));
#endif
    const float whole = rintf(x);
    return whole > 127.0f ? 127.0f : (whole < -127.0f ? -127.0f : whole);
}

// The MMA of P V wants four consecutive keys in a register where the MMA of Q K^T leaves two of one
// 8-key tile and two of the next. V^T is stored so that it fits without shuffles: byte p of each
// 16-key group holds this key of the group (README.md, "Permuted keys").
SLA2_INLINE int permuted_key(int p) { return ((p >> 2) << 1) + (p & 1) + ((p & 2) << 2); }
