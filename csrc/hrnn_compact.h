// The compact state: 40 instead of 76 bytes per parameter. lopt/compact.py describes and defines it.
//
// Codes are whole numbers held in `Number`; whoever includes this loads and stores them. Templated like hrnn_step.h.
#pragma once

#include "hrnn_step.h"

namespace lopt {

constexpr int kHiddenSteps = 32767;
constexpr int kMsSteps = 409;  // per octave
constexpr float kSmallestMs = 0x1p-80f, kLargestMs = 0x1p+80f;
constexpr int kMsZero = -32768;

namespace LOPT_ISA {

template <class Number>
struct Compact {
  using M = Math<Number>;
  using Part = typename Number::Part;

  static LOPT_HD Number nearest(const Number& x) { return (x + 0x1.8p+23f) - 0x1.8p+23f; }  // |x| < 2^22, ties to even

  static LOPT_HD Number hidden(const Number& code, float limit) { return code * (limit / kHiddenSteps); }
  static LOPT_HD Number hidden_steps(const Number& hidden, float limit) {  // not whole yet
    return M::min(M::max(hidden * (kHiddenSteps / limit), -kHiddenSteps), kHiddenSteps);
  }
  static LOPT_HD Number hidden_code(const Number& hidden, float limit) { return nearest(hidden_steps(hidden, limit)); }

  // The square root of ms, of which the code is given.
  static LOPT_HD Number root_ms(const Number& code) {
    return Number::map([](Part code, Part root) { return code != kMsZero ? root : root - root; }, code,
                       M::exp2(code * (.5f / kMsSteps)));
  }
  static LOPT_HD Number ms_code(const Number& ms) {
    const Number within = M::min(M::max(ms, kSmallestMs), kLargestMs);
    const Number code = nearest(M::log(within) * (1.44269504f * kMsSteps));
    return Number::map([](Part ms, Part code) { return ms > 0 ? code : (ms - ms) + kMsZero; }, ms, code);
  }

  // accum in units of the square root of ms, to the range of float16.
  static LOPT_HD Number ratio(const Number& accum, const Number& ms_code) {
    return M::min(M::max(accum * M::exp2(ms_code * (-.5f / kMsSteps)), -65504.f), 65504.f);
  }
};

}  // namespace LOPT_ISA
}  // namespace lopt
