// What a warp does together in csrc/gpu_mma.h, on the host: reads the lanes' registers from stdin and writes them to stdout.
#include <cstdio>

#include "gpu_mma.h"

namespace lopt::LOPT_ISA {
namespace {

template <class T>
T read() {
  T value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) throw "input ends early";
  return value;
}

template <class T>
void write(const T& value) {
  std::fwrite(&value, sizeof value, 1, stdout);
}

int run() {
  PerLane<Halves<4>> a([](int) { return read<Halves<4>>(); });
  PerLane<Halves<2>> b([](int) { return read<Halves<2>>(); });
  PerLane<Accumulator> c([](int) { return read<Accumulator>(); }), d;
  multiply_add(d, [&](int lane) { return a[lane]; }, [&](int lane) { return b[lane]; }, [&](int lane) { return c[lane]; });
  write(d);

  struct Rows {
    uint16_t number[kLanes][8];
  };
  const Rows rows = read<Rows>();
  PerLane<int> of([](int) { return read<int>(); });
  load_matrices(a, [&](int lane) { return rows.number[of[lane]]; });
  write(a);

  for (int i = 0; i < 4; i++) {
    const float low = read<float>(), high = read<float>();
    write(i < 2 ? pair_of_halves(low, high) : pair_of_bounded_halves(low, high));
  }
  return 0;
}

}  // namespace
}  // namespace lopt::LOPT_ISA

int main() { return lopt::LOPT_ISA::run(); }
