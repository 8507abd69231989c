// What happens to ONE parameter in one step of the hierarchical-RNN optimizer, written once.
//
// `Number` is several SIMD vectors on a CPU, one or several floats in a CUDA thread, double in checks: several, so that
// independent operations hide each other's latency and one read of a weight serves all. It has + - * / and converts from
// float; the elementary functions come from `Math<Number>`, which the includer defines. Nothing here knows of intrinsics,
// threads or torch.
//
// Order and letters are those of Wichrowska et al. 2017, section 3, and of lopt/backends/reference.py, which defines what is
// right. Three liberties, none of which changes the result beyond rounding:
//   - The log mean squares enter relative to their mean over the four timescales, so they sum to zero and one of them is
//     redundant. The kernel feeds log ms_s - log ms_4, s = 1, 2, 3: with weights that have their own mean over the
//     timescales subtracted (`pack` does), that is the same linear map in three rows instead of four.
//   - Weights into a sigmoid carry a factor -log2(e), into the tanh -2 log2(e), so that 2^x replaces e^-x.
//   - Update gate and candidate share one division:
//     u h + (1-u) tanh(c) = ((h + E) + C (h - E)) / ((1 + E)(1 + C)) with u = 1/(1+E) and C = e^-2c.
#pragma once

#include <cmath>

#include "pack.h"

namespace lopt {

constexpr int kHidden = 10;
constexpr int kTimescales = 4;
constexpr int kColumns = 5;  // of a matrix that are computed together: as many sums as registers hold
constexpr int kGroups = kHidden / kColumns;

// Features of a parameter. The optional products are last: without them the loops end before.
enum Feature {
  kScaled = 0,                                    // [4] asinh(accum / sqrt(ms))
  kLogMs = kScaled + kTimescales,                 // [3] log ms relative to the longest timescale's
  kRelativeLogLr = kLogMs + kTimescales - 1,
  kProducts = kRelativeLogLr + 1,                 // [3] of neighbouring scaled averages
  kFeatures = kProducts + kTimescales - 1,
};

template <bool attention_, bool products_>
struct Variant {
  static constexpr bool attention = attention_;  // a second direction
  static constexpr bool products = products_;
  static constexpr int features = products ? kFeatures : kProducts;
};

enum Decay { kGrad, kScale };
enum Damping { kTotal, kWeight, kFactor, kDampings };  // the numbers of a tensor's state of that name
constexpr int kSamples = 32;  // parameters of a tensor from which its distance from the start is estimated
enum Distance { kLargest, kAway };  // likewise: the largest distance, then how far each of those parameters is

// Meta-parameters of the parameter level, as `pack` lays them out.
template <class Real>
struct Weights {
  // Of reset gates, update gates, candidates; five units; from each input; each of the five. The gates' inputs are hidden
  // state and features, the candidates' features and reset hidden state, so that they are neighbours in `Step::input`.
  Real gru[3 * kGroups][kHidden + kFeatures][kColumns];
  Real direction[kHidden], direction_shortcut[kTimescales];  // without a shortcut 0
  Real attention[kHidden], attention_shortcut[kTimescales];
  Real decay[kHidden][2], decay_bias[2];
  Real log_lr[kHidden], log_lr_bias;
  Real momentum;             // of the smoothed log lr, after the sigmoid
  Real log_lr_min, log_lr_min_steps, log_lr_min_distance, log_lr_min_distance_limit;  // see `lowest_log_lr`
  Real log_lr_max, log_lr_max_ratio;  // see `highest_log_lr`
  Real log2_step_offset;     // binary logarithm of what the step is longer than the learning rate by
  Real attention_factor;     // how much longer the attention step is than the step
  Real ms_eps, rms_eps;
  Real moves_unseen;         // 1: a parameter without any gradient up to now moves too; 0: it stays
};

constexpr float kSeen = 1e30f;  // one over the least scaled average that counts as a gradient

// What differs from tensor to tensor.
template <class Real>
struct Injected {
  Real bias[3 * kGroups][kColumns];  // plus what the tensor's and the global state add
  Real relative_to;           // the mean log lr
  Real lowest, highest;       // bounds of the log lr
  Real rising_momentum;       // of the smoothed log lr where it rises: more than `momentum` after gradients that were small
  Real keep_ms[kTimescales];  // 0 where the mean squares are zero throughout the tensor: no past to average with
  bool keeps_all;             // keep_ms is 1, 1, 1, 1
  bool started;               // `has_started`: the decays of the first step are 0
};

namespace LOPT_ISA {

// The share of a learned step that is taken, as far as learned rates have to know: `share_taken` in
// lopt/backends/reference.py.
LOPT_HD float share_taken(float lr) { return fminf(fmaxf(2 * lr, 0.f), 1.f); }

// Whether a tensor has a past: it has taken steps and, with damping, had a gradient but 0.
LOPT_HD bool has_started(float step, const float* damping) { return step > 0 && !(damping && damping[kTotal] == 0); }

// Compares a tensor's gradient, of mean square `square`, with those before: `damp` in lopt/backends/reference.py. Updates the
// tensor's state and returns the factor of its steps.
LOPT_HD float damp(float* damping, float square, float share, float decay, float gradient_limit, float taken) {
  square = fminf(square, gradient_limit * gradient_limit);
  const float total = damping[kTotal] = decay * damping[kTotal] + (1 - decay) * square;
  const float weight = damping[kWeight] = decay * damping[kWeight] + (1 - decay);
  const float factor = fminf(sqrtf(total > 0 ? square / total * weight : 0.f) / share, 1.f);
  damping[kFactor] = factor * taken;
  return factor;
}

// Momentum of a rising log lr after that factor.
LOPT_HD float rising_momentum(float momentum, float factor) { return momentum + (1 - factor) * (1 - momentum); }

// Lower bound of the log lr of a tensor that has taken `step` steps. `distance` is not read unless the bound follows it.
LOPT_HD float lowest_log_lr(const Weights<float>& w, float step, const float* distance) {
  float lowest = w.log_lr_min;
  if (w.log_lr_min_steps > 0) lowest -= log1pf(step / w.log_lr_min_steps) / 2;
  if (w.log_lr_min_distance > 0) {
    const float limit = w.log_lr_min_distance_limit;
    const float largest = limit > 0 ? fminf(distance[kLargest], limit) : distance[kLargest];
    lowest = fmaxf(lowest, logf(w.log_lr_min_distance * largest) - log1pf(step) / 2);
  }
  return lowest;
}

// Upper bound of the log lr of a tensor with that lower bound and `mean` before the step.
LOPT_HD float highest_log_lr(const Weights<float>& w, float lowest, float mean) {
  if (!(w.log_lr_max_ratio > 0)) return w.log_lr_max;
  return fminf(fmaxf(mean + logf(w.log_lr_max_ratio), lowest), w.log_lr_max);
}

// Moves a sampled parameter of a tensor; returns the square of how far it is.
LOPT_HD float travel(float* distance, int sample, float move) {
  const float away = distance[kAway + sample] += move;
  return away * away;
}

// Takes note of the sum of these squares.
LOPT_HD void arrive(float* distance, float squares) {
  distance[kLargest] = fmaxf(distance[kLargest], sqrtf(squares / kSamples));
}

// Elementary functions: fma, min, max, sqrt, rsqrt, ratio, exp2, log, asinh; `divides_by_infinity`: exp2 of a large number is
// infinite and its ratio 0, otherwise arguments have to be bounded.
template <class Number>
struct Math;

// One step of one parameter. `Io` reads its state and takes the results, the sums over parameters included:
//     Number grad(), log_lr(), hidden(int), accum(int), ms(int)
//     void put_hidden(int, Number), put_accum(..), put_ms(..), put_feature(..), put_log_lr(Number), put_grad(Number),
//          put_update(Number direction, Number update), put_attention(Number direction, Number update)
// where an update is exp(log step) * direction. Each is called once, reads before writes.
//
// Loops are kept as loops: the code of a whole step then fits a CPU's cache of decoded instructions, about 8 kB.
template <class Number, class V, class Io>
struct Step {
  using M = Math<Number>;
  using Real = typename Number::Real;
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLargest = 60;  // of binary exponents, for products of two powers to be finite; 2^-60 is 0 beside 1

  const Weights<Real>& w;
  const Injected<Real>& tensor;
  Io& io;
  static constexpr int kInputs = kHidden + V::features;
  Number log_lr;
  Number input[kHidden + V::features + kHidden];  // hidden state | features | reset gate * hidden state
  Number power[3 * kHidden];  // pre-activations of reset gates, update gates, candidates; then e^-x, e^-x, e^-2x of them

  // Parts of `input`. Functions: a pointer to its own arrays would keep the object out of registers.
  LOPT_HD Number& hidden(int i) { return input[i]; }
  LOPT_HD Number& feature(int i) { return input[kHidden + i]; }
  LOPT_HD Number& reset(int i) { return input[kHidden + V::features + i]; }

  LOPT_HD Step(const Weights<Real>& w, const Injected<Real>& tensor, Io& io) : w(w), tensor(tensor), io(io) {}

  static LOPT_HD Number bounded_exp2(const Number& x) { return M::exp2(M::min(x, kLargest)); }
  static constexpr int kUnbounded = M::divides_by_infinity ? kHidden : 0;  // reset gates: 1 + 2^x is only divided by

  // Moving averages of the gradient and of their squares, and the features made of them. Both decays are read out of the
  // hidden state that the last step left.
  LOPT_HD void features() {
    Number grad_decay = w.decay_bias[kGrad], scale_decay = w.decay_bias[kScale];
    LOPT_LOOP for (int i = 0; i < kHidden; i++) {
      const Number h = hidden(i) = io.hidden(i);
      grad_decay = M::fma(h, w.decay[i][kGrad], grad_decay);
      scale_decay = M::fma(h, w.decay[i][kScale], scale_decay);
    }
    grad_decay = tensor.started ? M::ratio(1, bounded_exp2(grad_decay) + 1) : Number(0);
    scale_decay = tensor.started ? M::ratio(1, bounded_exp2(scale_decay) + 1) : Number(0);

    const Number grad = io.grad();
    io.put_grad(grad);
    Number log_ms[kTimescales];
    LOPT_LOOP for (int s = 0; s < kTimescales; s++) {
      const Number accum = M::fma(grad_decay, io.accum(s), (1 - grad_decay) * grad);
      io.put_accum(s, accum);
      grad_decay = M::sqrt(grad_decay);  // each timescale is twice the one before
      const Number keep = tensor.keeps_all ? scale_decay : scale_decay * tensor.keep_ms[s];
      const Number ms = M::fma(keep, io.ms(s), (1 - keep) * M::fma(accum, accum, w.ms_eps));
      io.put_ms(s, ms);
      log_ms[s] = ms + w.rms_eps;
      feature(kScaled + s) = accum * M::rsqrt(log_ms[s]);
    }
    LOPT_LOOP for (int s = 0; s < kTimescales; s++) {
      log_ms[s] = M::log(log_ms[s]);
      feature(kScaled + s) = M::asinh(feature(kScaled + s));
    }
    LOPT_LOOP for (int s = 0; s + 1 < kTimescales; s++) {
      feature(kLogMs + s) = log_ms[s] - log_ms[kTimescales - 1];
      if constexpr (V::products) feature(kProducts + s) = feature(kScaled + s) * feature(kScaled + s + 1);
    }
    log_lr = io.log_lr();
    feature(kRelativeLogLr) = log_lr - tensor.relative_to;
    LOPT_LOOP for (int i = 0; i < V::features; i++) io.put_feature(i, feature(i));
  }

  // out = bias + from @ weights, five columns.
  static LOPT_SHARED void affine(const Real (*weights)[kColumns], const Real* bias, const Number* from, Number* out) {
    Number sum[kColumns];
    LOPT_UNROLL for (int j = 0; j < kColumns; j++) sum[j] = bias[j];
    LOPT_THREE for (int i = 0; i < kInputs; i++) {
      LOPT_UNROLL for (int j = 0; j < kColumns; j++) sum[j] = M::fma(from[i], weights[i][j], sum[j]);
    }
    LOPT_UNROLL for (int j = 0; j < kColumns; j++) out[j] = sum[j];
  }

  // Pre-activations of the reset and update gates, of the candidates.
  LOPT_HD void multiply_gates() {
    LOPT_LOOP for (int k = 0; k < 2 * kGroups; k++) affine(w.gru[k], tensor.bias[k], input, power + k * kColumns);
  }
  LOPT_HD void multiply_candidates() {
    LOPT_LOOP for (int k = 2 * kGroups; k < 3 * kGroups; k++) affine(w.gru[k], tensor.bias[k], input + kHidden, power + k * kColumns);
  }

  LOPT_HD void gates() {
    LOPT_LOOP for (int i = 0; i < kUnbounded; i++) power[i] = M::exp2(power[i]);
    LOPT_LOOP for (int i = kUnbounded; i < 2 * kHidden; i++) power[i] = bounded_exp2(power[i]);
    LOPT_LOOP for (int i = 0; i < kHidden; i++) reset(i) = M::ratio(hidden(i), power[i] + 1);
  }

  // Candidate, new state and what is read out of it: direction, log lr and update.
  LOPT_HD void state() {
    LOPT_LOOP for (int i = 2 * kHidden; i < 3 * kHidden; i++) power[i] = bounded_exp2(power[i]);
    Number direction = 0, attention = 0, log_step = log_lr + w.log_lr_bias, largest = 0;
    LOPT_LOOP for (int s = 0; s < kTimescales; s++) {
      largest = M::max(largest, M::max(feature(kScaled + s), Number(0) - feature(kScaled + s)));
      direction = M::fma(feature(kScaled + s), w.direction_shortcut[s], direction);
      if constexpr (V::attention) attention = M::fma(feature(kScaled + s), w.attention_shortcut[s], attention);
    }
    LOPT_LOOP for (int i = 0; i < kHidden; i++) {
      const Number old = hidden(i), e = power[kHidden + i], above = e + 1, c = power[2 * kHidden + i];
      const Number h = M::ratio(M::fma(c, old - e, old + e), M::fma(c, above, above));
      io.put_hidden(i, h);
      direction = M::fma(h, w.direction[i], direction);
      log_step = M::fma(h, w.log_lr[i], log_step);
      if constexpr (V::attention) attention = M::fma(h, w.attention[i], attention);
    }
    log_step = M::min(M::max(log_step, tensor.lowest), tensor.highest);
    const Number fall = log_lr - log_step;
    io.put_log_lr(M::min(M::fma(w.momentum, fall, log_step), M::fma(tensor.rising_momentum, fall, log_step)));
    const Number moves = M::min(M::fma(largest, kSeen, w.moves_unseen), 1);
    const Number step = moves * M::exp2(M::fma(log_step, kLog2E, w.log2_step_offset));
    io.put_update(direction, step * direction);
    if constexpr (V::attention) io.put_attention(attention, step * attention * w.attention_factor);
  }

  LOPT_HD void advance() {
    features();
    multiply_gates();
    gates();
    multiply_candidates();
    state();
  }
};

}  // namespace LOPT_ISA
}  // namespace lopt
