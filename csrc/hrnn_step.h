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

#ifdef __CUDACC__
#define LOPT_HD __host__ __device__ __forceinline__
#define LOPT_UNROLL _Pragma("unroll")
#define LOPT_LOOP _Pragma("unroll")
#else
#define LOPT_HD inline __attribute__((always_inline))
#define LOPT_UNROLL _Pragma("GCC unroll 16")
#define LOPT_LOOP _Pragma("GCC unroll 1")  // the code of a whole step then fits the cache of decoded instructions
#endif

#ifndef LOPT_ISA
#define LOPT_ISA generic
#endif

namespace lopt {

constexpr int kHidden = 10;
constexpr int kTimescales = 4;
constexpr int kHalf = kHidden / 2;  // units whose gates are computed together

// Features of a parameter. The optional products are last: without them the loops end before.
enum Feature {
  kScaled = 0,                                    // [4] asinh(accum / sqrt(ms))
  kLogMs = kScaled + kTimescales,                 // [3] log ms relative to the longest timescale's
  kRelativeLogLr = kLogMs + kTimescales - 1,
  kProducts = kRelativeLogLr + 1,                 // [3] of neighbouring scaled averages
  kFeatures = kProducts + kTimescales - 1,
};

template <bool attention_, bool shortcut_, bool products_>
struct Variant {
  static constexpr bool attention = attention_;  // a second direction
  static constexpr bool shortcut = shortcut_;    // the scaled averages enter the directions
  static constexpr bool products = products_;
  static constexpr int features = products ? kFeatures : kProducts;
};

constexpr int kRowWidth = kHidden + 2;

// Meta-parameters of the parameter level, as `pack` lays them out.
template <class Real>
struct Weights {
  // Rows: the hidden state, then the features. Columns: for one half of the units and then for the other five times
  // reset, five times update; all ten candidates. Rows are padded to a multiple of 16 bytes.
  Real gates[2][kHidden + kFeatures][kRowWidth];
  Real candidate[kHidden + kFeatures][kRowWidth];
  Real direction[kHidden], direction_shortcut[kTimescales];
  Real attention[kHidden], attention_shortcut[kTimescales];
  Real grad_decay[kHidden], scale_decay[kHidden], log_lr[kHidden];
  Real grad_decay_bias, scale_decay_bias, log_lr_bias;
  Real momentum;             // of the smoothed log lr, after the sigmoid
  Real log_lr_min, log_lr_max;
  Real log2_step_offset;     // binary logarithm of what the step is longer than the learning rate by
  Real attention_factor;     // how much longer the attention step is than the step
  Real ms_eps, rms_eps;
};

// What differs from tensor to tensor.
template <class Real>
struct Injected {
  Real gates[2][kHidden];     // bias plus what the tensor's and the global state add, columns as in Weights
  Real candidate[kHidden];
  Real relative_to;           // the mean log lr
  Real keep_ms[kTimescales];  // 0 where the mean squares are zero throughout the tensor: no past to average with
  bool keeps_all;             // keep_ms is 1, 1, 1, 1
  bool started;               // not the first step: the decays of which are 0
};

namespace LOPT_ISA {

template <class Number>
struct Math;  // Real, fma, min, max, sqrt, rsqrt, exp2; log and asinh of an array in place;
              // kOutputs: sums to accumulate at once, 10 or 5, as registers allow

// A parameter with its state, and what the step makes of it. On a CPU this is memory, and a load waits for an earlier store
// that agrees with it in the last 12 bits of the address; the order of rows, 128 bytes each, keeps what is stored between
// two passes over `hidden` and `feature` (`reset`; `z` and `keep`) from agreeing with the rows such a pass begins with.
template <class Number>
struct Lanes {
  Number hidden[kHidden];  // before, then after the step
  Number feature[kFeatures];
  Number reset[kHidden];  // reset gate * hidden state
  Number accum[kTimescales], ms[kTimescales], log_lr, grad;  // before, then after the step
  Number z[kHidden];      // pre-activations
  Number keep[kHidden];   // e^-(pre-activation) of the update gate
  Number grad_decay, scale_decay;
  Number direction, attention_direction;
  Number update, attention_update;  // exp(log step) * direction, not normalised
};

template <class Number>
struct Step {
  using M = Math<Number>;
  using Real = typename M::Real;
  using L = Lanes<Number>;
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLargest = 60;  // bound of binary exponents, so that products of two powers are finite; 2^-60 is 0 beside 1

  // Both decays are read out of the hidden state that the last step left.
  static LOPT_HD void decays(const Weights<Real>& w, const Injected<Real>& tensor, L& l) {
    if (!tensor.started) {
      l.grad_decay = l.scale_decay = Number(0);
      return;
    }
    Number grad = w.grad_decay_bias, scale = w.scale_decay_bias;
    LOPT_LOOP for (int i = 0; i < kHidden; i++) {
      grad = M::fma(l.hidden[i], w.grad_decay[i], grad);
      scale = M::fma(l.hidden[i], w.scale_decay[i], scale);
    }
    l.grad_decay = Number(1) / (M::exp2(grad) + 1);
    l.scale_decay = Number(1) / (M::exp2(scale) + 1);
  }

  // Moving averages of the gradient and of their squares, and the features made of them.
  template <class V>
  static LOPT_HD void features(const Weights<Real>& w, const Injected<Real>& tensor, L& l) {
    Number decay = l.grad_decay, log_ms[kTimescales];
    LOPT_LOOP for (int s = 0; s < kTimescales; s++) {
      l.accum[s] = M::fma(decay, l.accum[s], (1 - decay) * l.grad);
      const Number keep = tensor.keeps_all ? l.scale_decay : l.scale_decay * tensor.keep_ms[s];
      l.ms[s] = M::fma(keep, l.ms[s], (1 - keep) * M::fma(l.accum[s], l.accum[s], w.ms_eps));
      log_ms[s] = l.ms[s] + w.rms_eps;
      l.feature[kScaled + s] = l.accum[s] * M::rsqrt(log_ms[s]);
      if (s + 1 < kTimescales) decay = M::sqrt(decay);  // each timescale is twice the one before
    }
    M::asinh(l.feature + kScaled, kTimescales);
    M::log(log_ms, kTimescales);
    LOPT_LOOP for (int s = 0; s + 1 < kTimescales; s++) {
      l.feature[kLogMs + s] = log_ms[s] - log_ms[kTimescales - 1];
      if constexpr (V::products) l.feature[kProducts + s] = l.feature[kScaled + s] * l.feature[kScaled + s + 1];
    }
    l.feature[kRelativeLogLr] = l.log_lr - tensor.relative_to;
  }

  // z = bias + state . weights[:10] + feature . weights[10:], M::kOutputs columns at a time.
  template <class V>
  static LOPT_HD void affine(const Real (*weights)[kRowWidth], const Real* bias, const Number* state, L& l) {
    constexpr int outputs = M::kOutputs;
    LOPT_LOOP for (int begin = 0; begin < kHidden; begin += outputs) {
      Number z[outputs];
      LOPT_UNROLL for (int j = 0; j < outputs; j++) z[j] = bias[begin + j];
      LOPT_LOOP for (int i = 0; i < kHidden; i++) {
        LOPT_UNROLL for (int j = 0; j < outputs; j++) z[j] = M::fma(state[i], weights[i][begin + j], z[j]);
      }
      LOPT_LOOP for (int i = 0; i < V::features; i++) {
        LOPT_UNROLL for (int j = 0; j < outputs; j++) z[j] = M::fma(l.feature[i], weights[kHidden + i][begin + j], z[j]);
      }
      LOPT_UNROLL for (int j = 0; j < outputs; j++) l.z[begin + j] = z[j];
    }
  }

  template <class V>
  static LOPT_HD void gates(const Weights<Real>& w, const Injected<Real>& tensor, L& l) {
    LOPT_LOOP for (int half = 0; half < 2; half++) {
      affine<V>(w.gates[half], tensor.gates[half], l.hidden, l);
      LOPT_LOOP for (int j = 0; j < kHalf; j++) {
        const int unit = half * kHalf + j;
        l.reset[unit] = l.hidden[unit] / (M::exp2(l.z[j]) + 1);
        l.keep[unit] = M::exp2(M::min(l.z[kHalf + j], kLargest));
      }
    }
  }

  // Candidate and new state.
  template <class V>
  static LOPT_HD void candidate(const Weights<Real>& w, const Injected<Real>& tensor, L& l) {
    affine<V>(w.candidate, tensor.candidate, l.reset, l);
    LOPT_LOOP for (int unit = 0; unit < kHidden; unit++) {
      const Number h = l.hidden[unit], e = l.keep[unit], above = e + 1, c = M::exp2(M::min(l.z[unit], kLargest));
      l.hidden[unit] = M::fma(c, h - e, h + e) / M::fma(c, above, above);
    }
  }

  // Direction, log lr and update, from the new hidden state.
  template <class V>
  static LOPT_HD void read_out(const Weights<Real>& w, L& l) {
    Number direction = Real(0), attention = Real(0), log_step = l.log_lr + w.log_lr_bias;
    LOPT_LOOP for (int i = 0; i < kHidden; i++) {
      direction = M::fma(l.hidden[i], w.direction[i], direction);
      log_step = M::fma(l.hidden[i], w.log_lr[i], log_step);
      if constexpr (V::attention) attention = M::fma(l.hidden[i], w.attention[i], attention);
    }
    if constexpr (V::shortcut) {
      LOPT_UNROLL for (int s = 0; s < kTimescales; s++) {
        direction = M::fma(l.feature[kScaled + s], w.direction_shortcut[s], direction);
        if constexpr (V::attention) attention = M::fma(l.feature[kScaled + s], w.attention_shortcut[s], attention);
      }
    }
    log_step = M::min(M::max(log_step, w.log_lr_min), w.log_lr_max);
    l.log_lr = M::fma(w.momentum, l.log_lr - log_step, log_step);
    const Number step = M::exp2(M::fma(log_step, kLog2E, w.log2_step_offset));
    l.direction = direction;
    l.update = step * direction;
    if constexpr (V::attention) {
      l.attention_direction = attention;
      l.attention_update = step * attention * w.attention_factor;
    }
  }

  template <class V>
  static LOPT_HD void advance(const Weights<Real>& w, const Injected<Real>& tensor, L& l) {
    decays(w, tensor, l);
    features<V>(w, tensor, l);
    gates<V>(w, tensor, l);
    candidate<V>(w, tensor, l);
    read_out<V>(w, l);
  }
};

}  // namespace LOPT_ISA
}  // namespace lopt
