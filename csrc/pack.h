// P numbers handled as one: each operation is P independent instructions, which hide its latency, and one read of a weight
// serves all. The element is a SIMD vector on a CPU, float in a CUDA thread, double in checks.
#pragma once

#ifdef __CUDACC__
#define LOPT_HD __host__ __device__ __forceinline__
#define LOPT_SHARED __host__ __device__ __forceinline__
#define LOPT_UNROLL _Pragma("unroll")
#define LOPT_LOOP _Pragma("unroll")
#define LOPT_THREE _Pragma("unroll")
#else
#define LOPT_HD inline __attribute__((always_inline))
#define LOPT_SHARED __attribute__((noinline))
#define LOPT_UNROLL _Pragma("GCC unroll 64")
#define LOPT_LOOP _Pragma("GCC unroll 1")
#define LOPT_THREE _Pragma("GCC unroll 3")
#endif

#ifndef LOPT_ISA
#define LOPT_ISA generic
#endif

namespace lopt::LOPT_ISA {

// What an element type is made of: `Real`, the type of one lane, and `splat(Real)`.
template <class Element>
struct Lane {
  using Real = Element;
  static LOPT_HD Element splat(Real value) { return value; }
};

template <class Element, int P>
struct Pack {
  using Part = Element;
  using Real = typename Lane<Element>::Real;
  static constexpr int parts = P;
  Element part[P];

  Pack() = default;
  LOPT_HD Pack(Real value) {  // NOLINT: numbers convert
    LOPT_UNROLL for (int p = 0; p < P; p++) part[p] = Lane<Element>::splat(value);
  }

  template <class Function, class... Packs>
  static LOPT_HD Pack map(Function function, const Packs&... of) {
    Pack result;
    LOPT_UNROLL for (int p = 0; p < P; p++) result.part[p] = function(of.part[p]...);
    return result;
  }

  friend LOPT_HD Pack operator+(const Pack& a, const Pack& b) {
    return map([](Element a, Element b) { return a + b; }, a, b);
  }
  friend LOPT_HD Pack operator-(const Pack& a, const Pack& b) {
    return map([](Element a, Element b) { return a - b; }, a, b);
  }
  friend LOPT_HD Pack operator*(const Pack& a, const Pack& b) {
    return map([](Element a, Element b) { return a * b; }, a, b);
  }
};

}  // namespace lopt::LOPT_ISA
