// The 8-bit formats of a precision, as sla2_core.formats defines them: scale max|x| / limit
// (1 if the maximum is 0).
#pragma once

#include "common.cuh"

constexpr bool QK_FP8 = SLA2_PRECISION == 3;
constexpr bool PV_FP8 = SLA2_PRECISION == 1 || SLA2_PRECISION == 3;
constexpr float QK_LIMIT = QK_FP8 ? 448.0f : 127.0f;
constexpr float PV_LIMIT = PV_FP8 ? 448.0f : 127.0f;

// NaN and inf maxima give NaN and inf scales, so that they show in everything the scale touches.
SLA2_INLINE float scale_of(float maximum, float limit) {
    return maximum == 0.0f ? 1.0f : maximum / limit;
}

SLA2_INLINE unsigned round_int8(float x) {
    // A NaN comes out as -127, and is not lost: the block's scale or, for P, the row sum has it.
    const int rounded = __float2int_rn(fminf(fmaxf(x, -127.0f), 127.0f));
    return static_cast<unsigned>(clamp_int(rounded, -127, 127)) & 0xffu;
}

// Four values, already divided by their scales, as four bytes; the first in bits 0-7.
template <bool FP8>
SLA2_INLINE unsigned pack_bytes(float a, float b, float c, float d) {
#if SLA2_ARCH >= 89
    if (FP8) return cvt_e4m3x2(a, b) | static_cast<unsigned>(cvt_e4m3x2(c, d)) << 16;
#endif
    return round_int8(a) | round_int8(b) << 8 | round_int8(c) << 16 | round_int8(d) << 24;
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
