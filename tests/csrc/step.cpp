// One step of hrnn_step.h for parameters and weights from a small generator; prints the bits of everything it puts out.
#include <cstdio>

#include "gpu_math.h"

namespace lopt::LOPT_ISA {
namespace {

uint32_t seed = 1;

float random(float low, float high) {
  seed = seed * 1664525u + 1013904223u;
  return low + (high - low) * (float(seed >> 8) * 0x1p-24f);
}

constexpr int P = 4;
using Number = Pack<float, P>;

void print(const char* name, int index, const Number& value) {
  for (int p = 0; p < P; p++) std::printf("%s[%d] %08x\n", name, index, bits_of(value.part[p]));
}

struct Io {
  static Number draw(float low, float high) {
    Number value;
    for (int p = 0; p < P; p++) value.part[p] = random(low, high);
    return value;
  }
  Number hidden(int) { return draw(-1, 1); }
  Number accum(int) { return draw(-1, 1); }
  Number ms(int) { return draw(0.1f, 2); }
  Number grad() { return draw(-3, 3); }
  Number log_lr() { return draw(-9, -4); }
  void put_hidden(int i, const Number& x) { print("hidden", i, x); }
  void put_accum(int i, const Number& x) { print("accum", i, x); }
  void put_ms(int i, const Number& x) { print("ms", i, x); }
  void put_feature(int i, const Number& x) { print("feature", i, x); }
  void put_grad(const Number& x) { print("grad", 0, x); }
  void put_log_lr(const Number& x) { print("log_lr", 0, x); }
  void put_update(const Number& direction, const Number& update) { print("direction", 0, direction), print("update", 0, update); }
  void put_attention(const Number& direction, const Number& update) { print("attention", 0, direction), print("attention", 1, update); }
};

int run() {
  Weights<float> weights;
  Injected<float> tensor;
  float* values = reinterpret_cast<float*>(&weights);
  for (size_t i = 0; i < sizeof weights / sizeof(float); i++) values[i] = random(-0.5f, 0.5f);
  weights.momentum = 0.9f, weights.ms_eps = weights.rms_eps = 1e-24f;
  for (auto& group : tensor.bias) for (float& bias : group) bias = random(-1, 1);
  for (float& keep : tensor.keep_ms) keep = 1;
  tensor.relative_to = -6, tensor.lowest = -12, tensor.highest = 0, tensor.rising_momentum = 0.95f;
  tensor.keeps_all = tensor.started = true;
  for (int repeat = 0; repeat < 50; repeat++) {
    Io io;
    Step<Number, Variant<true, true>, Io>(weights, tensor, io).advance();
  }
  return 0;
}

}  // namespace
}  // namespace lopt::LOPT_ISA

int main() { return lopt::LOPT_ISA::run(); }
