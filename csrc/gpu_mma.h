// Matrix products by the tensor cores of a Nvidia GPU: a warp multiplies numbers in float16 and adds up in float32.
//
// A warp is written as a `Block` is, see hrnn_gpu.h: what its lanes do each for itself in `each`, what they do together as
// functions of all lanes' registers. On the host the latter are emulated lane by lane with the layouts of the PTX manual, so
// that a number that a kernel takes for another one's is the wrong number there too. Tests: tests/csrc/test_mma.py.
#pragma once

#include <utility>

#include "gpu_math.h"

namespace lopt::LOPT_ISA {

constexpr int kLanes = 32;

// What each lane of a warp has of its own: registers of the thread on a GPU, an array on the host. `make(lane)` makes them.
template <class T>
class PerLane {
#ifdef __CUDA_ARCH__
  static constexpr int here = 1;
  static LOPT_HD int lane_of(int) { return threadIdx.x % kLanes; }
  static LOPT_HD int index_of(int) { return 0; }
#else
  static constexpr int here = kLanes;
  static LOPT_HD int lane_of(int index) { return index; }
  static LOPT_HD int index_of(int lane) { return lane; }
#endif
  T value[here];

  template <class Make, int... index>
  LOPT_HD PerLane(Make make, std::integer_sequence<int, index...>) : value{make(lane_of(index))...} {}

 public:
  PerLane() = default;
  template <class Make>
  explicit LOPT_HD PerLane(Make make) : PerLane(make, std::make_integer_sequence<int, here>()) {}
  LOPT_HD T& operator[](int lane) { return value[index_of(lane)]; }
};

struct Warp {
  int index;  // in its block

  // Calls f(lane) for all lanes, then waits for all.
  template <class Function>
  LOPT_HD void each(Function f) const {
#ifdef __CUDA_ARCH__
    f(int(threadIdx.x % kLanes));
    __syncwarp();
#else
    for (int lane = 0; lane < kLanes; lane++) f(lane);
#endif
  }
};

// Registers of pairs of float16, the one of the lower index in the lower bits.
template <int count>
struct Halves {
  uint32_t pair[count];
};

constexpr float kLargestHalf = 65504;

LOPT_HD uint32_t pair_of_halves(float low, float high) {
#ifdef __CUDA_ARCH__
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  return bits;
#else
  return to_f16(low) | uint32_t(to_f16(high)) << 16;
#endif
}

// The same for numbers beyond float16: the nearest that it has, for NaN the least.
LOPT_HD uint32_t pair_of_bounded_halves(float low, float high) {
#ifdef __CUDA_ARCH__
  const __half2 largest = __float2half2_rn(kLargestHalf), least = __float2half2_rn(-kLargestHalf);
  const __half2 pair = __hmin2(__hmax2(__floats2half2_rn(low, high), least), largest);
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  return bits;
#else
  const auto bounded = [](float x) { return fminf(fmaxf(x, -kLargestHalf), kLargestHalf); };
  return pair_of_halves(bounded(low), bounded(high));
#endif
}

// ldmatrix: four 8 x 8 matrices of float16. `row(lane)`, 16 bytes aligned to as many in shared memory, is row lane % 8 of
// matrix lane / 8. Lane 4 g + t gets the numbers 2 t and 2 t + 1 of row g of each matrix.
template <class Row>
LOPT_HD void load_matrices(PerLane<Halves<4>>& to, Row row) {
#ifdef __CUDA_ARCH__
  const int lane = threadIdx.x % kLanes;
  uint32_t* const pair = to[lane].pair;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pair[0]), "=r"(pair[1]), "=r"(pair[2]), "=r"(pair[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row(lane))))
               : "memory");
#else
  for (int lane = 0; lane < kLanes; lane++)
    for (int matrix = 0; matrix < 4; matrix++) {
      const uint16_t* const from = row(8 * matrix + lane / 4) + 2 * (lane % 4);
      to[lane].pair[matrix] = from[0] | uint32_t(from[1]) << 16;
    }
#endif
}

// mma.m16n8k16: d = a @ b + c with a [16, 16] and b [16, 8] in float16, c and d [16, 8] in float32. Lane 4 g + t has of
//     a      rows g, g + 8, g, g + 8, of which the columns 2 t, 2 t + 1 and, in the last two pairs, 8 more than these
//     b      column g, of which the rows 2 t, 2 t + 1 and, in the second pair, 8 more than these
//     c, d   rows g, g, g + 8, g + 8, columns 2 t, 2 t + 1, 2 t, 2 t + 1
struct Accumulator {
  float value[4];
};

template <class A, class B, class C>
LOPT_HD void multiply_add(PerLane<Accumulator>& d, A a, B b, C c) {
#ifdef __CUDA_ARCH__
  const int lane = threadIdx.x % kLanes;
  const Halves<4> left = a(lane);
  const Halves<2> right = b(lane);
  const Accumulator start = c(lane);
  float* const sum = d[lane].value;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
               : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
               : "r"(left.pair[0]), "r"(left.pair[1]), "r"(left.pair[2]), "r"(left.pair[3]), "r"(right.pair[0]), "r"(right.pair[1]),
                 "f"(start.value[0]), "f"(start.value[1]), "f"(start.value[2]), "f"(start.value[3]));
#else
  float left[16][16], right[16][8];
  const auto half = [](const uint32_t* pair, int i) { return from_f16(uint16_t(pair[i / 2] >> 16 * (i % 2))); };
  for (int lane = 0; lane < kLanes; lane++) {
    const int g = lane / 4, t = lane % 4;
    const Halves<4> of_a = a(lane);
    const Halves<2> of_b = b(lane);
    for (int i = 0; i < 8; i++) left[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] = half(of_a.pair, i);
    for (int i = 0; i < 4; i++) right[2 * t + i % 2 + 8 * (i / 2)][g] = half(of_b.pair, i);
  }
  for (int lane = 0; lane < kLanes; lane++) {
    const Accumulator start = c(lane);
    for (int i = 0; i < 4; i++) {
      float sum = start.value[i];
      for (int k = 0; k < 16; k++) sum = fmaf(left[lane / 4 + 8 * (i / 2)][k], right[k][2 * (lane % 4) + i % 2], sum);
      d[lane].value[i] = sum;
    }
  }
#endif
}

}  // namespace lopt::LOPT_ISA
