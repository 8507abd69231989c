// A vector of floats and the elementary functions that csrc/hrnn_step.h needs, for CPUs.
//
// `Vec` is a GCC/Clang vector extension, 16 floats wide with AVX-512, 8 with AVX2, otherwise 4 (SSE, NEON); operators are
// the compiler's. `Math` holds the functions, for packs of Vec and of plain float or double. Where an instruction of
// AVX-512 replaces several, it is used behind __AVX512F__; everything else is portable.
//
// Error bounds, in units in the last place against the exact value, tested by tests/csrc/test_simd.py:
//     exp2    3 (1.1 without AVX-512)      log     2 (absolute 1.2e-7 where |log x| < 1)      asinh   5
//     rsqrt   2      ratio   1 (0.5: IEEE division)                     sqrt    0.5 (IEEE)
// Subnormal numbers may count as zero: the callers switch them off, since a forgotten gradient's average decays into them
// and each operation on one would cost a hundred cycles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hrnn_step.h"

#if defined(__SSE2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own header's "undefined" vectors
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace lopt::LOPT_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32
#else
constexpr bool kManyRegisters = false;  // 16
#endif

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFuses = true;  // a * b + c is one instruction, rounded once
#else
constexpr bool kFuses = false;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef int16_t Shorts __attribute__((vector_size(2 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

template <class To, class From>
LOPT_HD To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

LOPT_HD Vec splat(float value) { return value - Vec{}; }
LOPT_HD Ints splat(int32_t value) { return value - Ints{}; }

LOPT_HD Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

LOPT_HD void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

LOPT_HD Vec select(Ints where, Vec yes, Vec no) { return where ? yes : no; }

LOPT_HD Ints lane_numbers() {
  Ints numbers;
  for (int lane = 0; lane < kWidth; lane++) numbers[lane] = lane;
  return numbers;
}

// Pairwise.
LOPT_HD float lane_sum(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int half = kWidth / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) x[lane] += x[lane + half];
  return x[0];
#endif
}

LOPT_HD double lane_sum(double x) { return x; }

// b if either is NaN.
LOPT_HD Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

LOPT_HD Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

LOPT_HD Vec absolute(Vec x) { return bits_of<Vec>(bits_of<Ints>(x) & 0x7fffffff); }

LOPT_HD Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Vec)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (Vec)vsqrtq_f32((float32x4_t)x);
#else
  for (int lane = 0; lane < kWidth; lane++) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

// x = mantissa * 2^exponent with a mantissa in [.75, 1.5), for x > 0.
LOPT_HD Vec log_exponent(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_getexp_ps((__m512)(x * 0x1.555556p+0f));
#else
  return __builtin_convertvector((bits_of<Ints>(x) - 0x3f400000) >> 23, Vec);
#endif
}

LOPT_HD Vec log_mantissa(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
#else
  return bits_of<Vec>(((bits_of<Ints>(x) - 0x3f400000) & 0x007fffff) + 0x3f400000);
#endif
}

template <>
struct Lane<Vec> {
  using Real = float;
  static LOPT_HD Vec splat(float value) { return lopt::LOPT_ISA::splat(value); }
};

// Elementary functions of scalars: the C library's.
template <class Real, int P>
struct Math<Pack<Real, P>> {
  static constexpr bool divides_by_infinity = true;
  using Number = Pack<Real, P>;
  static Number fma(const Number& a, const Number& b, const Number& c) {
    return Number::map([](Real a, Real b, Real c) { return std::fma(a, b, c); }, a, b, c);
  }
  static Number min(const Number& a, const Number& b) { return Number::map([](Real a, Real b) { return std::fmin(a, b); }, a, b); }
  static Number max(const Number& a, const Number& b) { return Number::map([](Real a, Real b) { return std::fmax(a, b); }, a, b); }
  static Number sqrt(const Number& x) { return Number::map([](Real x) { return std::sqrt(x); }, x); }
  static Number rsqrt(const Number& x) { return Number::map([](Real x) { return 1 / std::sqrt(x); }, x); }
  static Number ratio(const Number& a, const Number& b) { return Number::map([](Real a, Real b) { return a / b; }, a, b); }
  static Number exp2(const Number& x) { return Number::map([](Real x) { return std::exp2(x); }, x); }
  static Number log(const Number& x) { return Number::map([](Real x) { return std::log(x); }, x); }
  static Number asinh(const Number& x) { return Number::map([](Real x) { return std::asinh(x); }, x); }
};

// Elementary functions of vectors.
template <int P>
struct Math<Pack<Vec, P>> {
  static constexpr bool divides_by_infinity = false;
  using Number = Pack<Vec, P>;
  static LOPT_HD Number fma(const Number& a, const Number& b, const Number& c) {
    return Number::map([](Vec a, Vec b, Vec c) { return a * b + c; }, a, b, c);  // one instruction where there is one
  }
  static LOPT_HD Number min(const Number& a, const Number& b) {
    return Number::map([](Vec a, Vec b) { return lopt::LOPT_ISA::min(a, b); }, a, b);
  }
  static LOPT_HD Number max(const Number& a, const Number& b) {
    return Number::map([](Vec a, Vec b) { return lopt::LOPT_ISA::max(a, b); }, a, b);
  }
  static LOPT_HD Number sqrt(const Number& x) { return Number::map(square_root, x); }

  static LOPT_HD Number rsqrt(const Number& x) {
#if defined(__AVX512F__)
    const Number y = Number::map([](Vec x) { return (Vec)_mm512_rsqrt14_ps((__m512)x); }, x);
    return fma(y * 0.5f, 1 - x * y * y, y);  // one Newton step
#else
    return Number::map([](Vec x) { return 1.f / square_root(x); }, x);
#endif
  }

  // a / b, for b and 1 / b within the range of float.
  static LOPT_HD Number ratio(const Number& a, const Number& b) {
#if defined(__AVX512F__)
    const Number y = Number::map([](Vec b) { return (Vec)_mm512_rcp14_ps((__m512)b); }, b);
    const Number quotient = a * y;
    return fma(a - quotient * b, y, quotient);  // one Newton step
#else
    return Number::map([](Vec a, Vec b) { return a / b; }, a, b);
#endif
  }

  template <class... Coefficients>
  static LOPT_HD Number polynomial(const Number& x, const Number& sum, float next, Coefficients... rest) {
    if constexpr (sizeof...(rest) == 0)
      return fma(sum, x, next);
    else
      return polynomial(x, fma(sum, x, next), rest...);
  }

  // 2^x, saturating at the ends of the range of float: never NaN for a number.
  static LOPT_HD Number exp2(const Number& x) {
#if defined(__AVX512DQ__)
    const Number f = Number::map([](Vec x) { return (Vec)_mm512_reduce_ps((__m512)x, 0x09); }, x);  // x - floor(x)
    const Number p = polynomial(f, 0x1.ec320ap-10f, 0x1.26900ep-7f, 0x1.c95446p-5f, 0x1.ebd5a8p-3f, 0x1.62e4f6p-1f, 0x1.fffffep-1f);
    return Number::map([](Vec p, Vec x) { return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x); }, p, x);  // p * 2^floor(x)
#else
    const Number bounded = min(max(x, -126.f), 0x1.fffffep+6f);
    const float magic = 0x1.8p+23f;  // adding it leaves the nearest integer in the low bits
    const Number shifted = bounded + magic, f = bounded - (shifted - magic);
    const Number p = polynomial(f, 0x1.3f907ap-13f, 0x1.5f0a68p-10f, 0x1.3b30b0p-7f, 0x1.c6af78p-5f, 0x1.ebfbd8p-3f, 0x1.62e430p-1f, 1.f);
    return Number::map(
        [](Vec p, Vec shifted) { return bits_of<Vec>(bits_of<Ints>(p) + (bits_of<Ints>(shifted) << 23)); }, p, shifted);
#endif
  }

  // Natural logarithm of x > 0.
  static LOPT_HD Number log(const Number& x) {
    const Number exponent = Number::map(log_exponent, x), f = Number::map(log_mantissa, x) - 1;
    const Number p = polynomial(f, -0x1.5f6fb8p-5f, 0x1.a53c56p-4f, -0x1.0dfac8p-3f, 0x1.296640p-3f, -0x1.54fefap-3f,
                                0x1.9959ccp-3f, -0x1.ffff14p-3f, 0x1.5555d0p-2f, -0x1.000002p-1f);
    const Number mantissa = fma(p, f * f, f);
    if constexpr (kFuses) return fma(exponent, 0x1.62e430p-1f, mantissa);
    return exponent * 0x1.62e4p-1f + (exponent * 0x1.7f7d1cp-20f + mantissa);  // the first product is exact
  }

  // log(|x| + sqrt(x^2 + 1)) with the sign of x; near 0, where that cancels, an odd polynomial. The former is accurate to
  // 1.2e-7 in absolute terms, so it is good enough from .48 on. Beyond 1e18, where the square would overflow, constant.
  static LOPT_HD Number asinh(const Number& x) {
    const Number magnitude = Number::map([](Vec x) { return lopt::LOPT_ISA::min(absolute(x), splat(1e18f)); }, x);
    const Number square = magnitude * magnitude;
    const Number above = square + 1, large = log(fma(above, rsqrt(above), magnitude));
    const Number p = polynomial(square, -0x1.b21d24p-7f, 0x1.cda0dep-6f, -0x1.6b9be8p-5f, 0x1.332530p-4f, -0x1.555536p-3f);
    const Number small = fma(p * square, magnitude, magnitude);
    const Number result = Number::map([](Vec small, Vec large) { return large < 0.48f ? small : large; }, small, large);
    return Number::map(
        [](Vec x, Vec result) { return bits_of<Vec>(bits_of<Ints>(result) | (bits_of<Ints>(x) & INT32_MIN)); }, x, result);
  }
};

// 16-bit formats: to float exactly, from float to nearest even.

LOPT_HD Vec from_bf16(Halves x) { return bits_of<Vec>(__builtin_convertvector(x, Ints) << 16); }

LOPT_HD Halves to_bf16(Vec x) {
  const Ints bits = bits_of<Ints>(x);
  const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : splat((int32_t)0x7fc0), Halves);
}

LOPT_HD Vec from_f16(Halves x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)x);
#else
  const Ints bits = __builtin_convertvector(x, Ints), magnitude = bits & 0x7fff;
  const Ints rebiased = (magnitude << 13) + (112 << 23);
  const Ints special = rebiased + (112 << 23);  // infinities and NaN: all exponent bits set
  const Vec subnormal = __builtin_convertvector(magnitude, Vec) * 0x1p-24f;
  const Ints finite = magnitude < 0x0400 ? bits_of<Ints>(subnormal) : rebiased;
  return bits_of<Vec>((magnitude >= 0x7c00 ? special : finite) | ((bits & 0x8000) << 16));
#endif
}

LOPT_HD Halves to_f16(Vec x) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const Ints bits = bits_of<Ints>(x), magnitude = bits & 0x7fffffff;
  const Ints normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding .5 leaves a multiple of 2^-24, rounded, in the low bits.
  const Ints subnormal = bits_of<Ints>(bits_of<Vec>(magnitude) + 0.5f) - 0x3f000000;
  const Ints special = magnitude > 0x7f800000 ? splat((int32_t)0x7e00) : splat((int32_t)0x7c00);
  const Ints finite = magnitude < 0x38800000 ? subnormal : normal;
  const Ints result = (magnitude >= 0x477ff000 ? special : finite) | ((bits >> 16) & 0x8000);
  return __builtin_convertvector(result, Halves);
#endif
}

// Within its life subnormal results and operands count as zero on this thread.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : old_(_mm_getcsr()) { _mm_setcsr(old_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(old_); }

 private:
  unsigned old_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(old_));
    asm volatile("msr fpcr, %0" ::"r"(old_ | (1ull << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(old_)); }

 private:
  uint64_t old_;
#else
  FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace lopt::LOPT_ISA
