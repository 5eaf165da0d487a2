// Conversions between fp32 and fp16, bf16 and e4m3 as the cvt instructions make them: round to
// nearest even, NaN kept.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }

inline float bf16_to_f32(unsigned short h) {
    return __uint_as_float(static_cast<unsigned>(h) << 16);
}

inline unsigned short f32_to_bf16(float x) {
    unsigned u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<unsigned short>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float f16_to_f32(unsigned short h) {
    unsigned sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    if (rest < 0x400u)
        return __uint_as_float(sign | __float_as_uint(static_cast<float>(rest) * 0x1p-24f));
    return __uint_as_float(sign | ((rest << 13) + 0x38000000u));
}

inline unsigned short f32_to_f16(float x) {
    unsigned u = __float_as_uint(x), sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return 0x7fff;
    if (u >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);
    if (u < 0x38800000u)  // a subnormal: adding 0.5 rounds to multiples of 2^-24
        return static_cast<unsigned short>(
            sign | (__float_as_uint(__uint_as_float(u) + 0.5f) - 0x3f000000u));
    u += 0xfffu + ((u >> 13) & 1u);
    return static_cast<unsigned short>(sign | ((u - 0x38000000u) >> 13));
}

inline float e4m3_to_f32(unsigned char b) {
    unsigned sign = (b & 0x80u) << 24, rest = b & 0x7fu;
    if (rest == 0x7fu) return __uint_as_float(sign | 0x7fc00000u);
    if (rest < 8u)
        return __uint_as_float(sign | __float_as_uint(static_cast<float>(rest) * 0x1p-9f));
    return __uint_as_float(sign | ((rest << 20) + 0x3c000000u));
}

inline unsigned char f32_to_e4m3(float x) {  // satfinite: beyond 448 gives 448
    unsigned u = __float_as_uint(x), sign = (u >> 24) & 0x80u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return 0x7f;
    if (u >= 0x43e00000u) return static_cast<unsigned char>(sign | 0x7eu);
    if (u < 0x3c800000u)  // a subnormal: adding 2^14 rounds to multiples of 2^-9
        return static_cast<unsigned char>(
            sign | (__float_as_uint(__uint_as_float(u) + 16384.0f) - 0x46800000u));
    u += 0x7ffffu + ((u >> 20) & 1u);
    return static_cast<unsigned char>(sign | ((u - 0x3c000000u) >> 20));
}
