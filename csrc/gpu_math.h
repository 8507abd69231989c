// Elementary functions of floats in a CUDA thread, for csrc/hrnn_step.h: the approximations of the special function unit.
// Compiled for the host they are the C library's, so that everything made of them can be checked there.
//
// Error bounds in units in the last place, from the PTX manual:
//     exp2    2      log     3 (absolute 2.4e-7 where |log x| < 1)      asinh   6
//     rsqrt   3      ratio   2                                          sqrt    1
// Subnormal operands and results of these functions are zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include "hrnn_step.h"

namespace lopt::LOPT_ISA {

#ifdef __CUDA_ARCH__
#define LOPT_SPECIAL(name, instruction, on_host)             \
  static LOPT_HD float name(float x) {                       \
    float y;                                                 \
    asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                                \
  }
#else
#define LOPT_SPECIAL(name, instruction, on_host) \
  static LOPT_HD float name(float x) { return on_host; }
#endif

struct Special {
  LOPT_SPECIAL(exp2, "ex2", std::exp2(x))
  LOPT_SPECIAL(log2, "lg2", std::log2(x))
  LOPT_SPECIAL(reciprocal, "rcp", 1 / x)
  LOPT_SPECIAL(rsqrt, "rsqrt", 1 / std::sqrt(x))
  LOPT_SPECIAL(sqrt, "sqrt", std::sqrt(x))
};
#undef LOPT_SPECIAL

template <int P>
struct Math<Pack<float, P>> {
  using Number = Pack<float, P>;
  static constexpr bool divides_by_infinity = true;
  static LOPT_HD Number fma(const Number& a, const Number& b, const Number& c) {
    return Number::map([](float a, float b, float c) { return fmaf(a, b, c); }, a, b, c);
  }
  static LOPT_HD Number min(const Number& a, const Number& b) {
    return Number::map([](float a, float b) { return fminf(a, b); }, a, b);
  }
  static LOPT_HD Number max(const Number& a, const Number& b) {
    return Number::map([](float a, float b) { return fmaxf(a, b); }, a, b);
  }
  static LOPT_HD Number sqrt(const Number& x) {
    return Number::map([](float x) { return Special::sqrt(x); }, x);
  }
  static LOPT_HD Number rsqrt(const Number& x) {
    return Number::map([](float x) { return Special::rsqrt(x); }, x);
  }
  static LOPT_HD Number ratio(const Number& a, const Number& b) {
    return Number::map([](float a, float b) { return a * Special::reciprocal(b); }, a, b);
  }
  static LOPT_HD Number exp2(const Number& x) {
    return Number::map([](float x) { return Special::exp2(x); }, x);
  }
  static LOPT_HD Number log(const Number& x) {
    return Number::map([](float x) { return Special::log2(x) * 0x1.62e430p-1f; }, x);
  }

  // log(|x| + sqrt(x^2 + 1)) with the sign of x; near 0, where that cancels, an odd polynomial. Beyond 1e18, where the square
  // would overflow, constant. Coefficients are those of csrc/simd.h.
  static LOPT_HD Number asinh(const Number& x) {
    return Number::map(
        [](float x) {
          const float magnitude = fminf(fabsf(x), 1e18f), square = magnitude * magnitude, above = square + 1;
          const float large = Special::log2(fmaf(above, Special::rsqrt(above), magnitude)) * 0x1.62e430p-1f;
          float p = fmaf(square, -0x1.b21d24p-7f, 0x1.cda0dep-6f);
          p = fmaf(p, square, -0x1.6b9be8p-5f);
          p = fmaf(p, square, 0x1.332530p-4f);
          p = fmaf(p, square, -0x1.555536p-3f);
          return copysignf(large < 0.48f ? fmaf(p * square, magnitude, magnitude) : large, x);
        },
        x);
  }
};

// 16-bit formats: to float exactly, from float to nearest even.

LOPT_HD float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

LOPT_HD uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

LOPT_HD float from_bf16(uint16_t half) { return float_of(uint32_t(half) << 16); }

LOPT_HD uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  return value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

LOPT_HD float from_f16(uint16_t half) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(half));
#else
  const uint32_t magnitude = half & 0x7fffu, sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);  // subnormals too
  return float_of((magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000u : finite) | sign);
#endif
}

LOPT_HD uint16_t to_f16(float value) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const float size = std::fabs(value);
  if (!(size < 65520.f)) return sign | (size == size ? 0x7c00 : 0x7e00);
  // Adding .5 leaves a multiple of 2^-24, rounded, in the low bits.
  if (size < 0x1p-14f) return sign | (bits_of(size + 0.5f) - 0x3f000000u);
  const uint32_t bits = bits_of(size) - (112u << 23);
  return sign | ((bits + 0xfff + ((bits >> 13) & 1)) >> 13);
#endif
}

}  // namespace lopt::LOPT_ISA
