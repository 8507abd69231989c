// The step of ONE parameter as meta-training needs it: with the decays as inputs, all that the derivative needs kept, and the
// derivative itself: cotangents of the new state, update and sums in, those of the old state and the weights out.
//
// Templated over the number type like hrnn_step.h, whose constants and Math<Number> it uses; `nonzero` comes from the includer
// too. Weights are neither scaled nor shifted, so that gradients by them are those of the meta-parameters. First
// order: the incoming gradient is a constant. The clip of the log lr is passed straight through. Where a decay is 0 (the
// first step) the derivative of its square root, which is infinite, counts as 0.
//
// Reference: lopt/backends/reference.py, advance_flat. Tests: tests/kernels/test_hrnn_meta.py.
#pragma once

#include "hrnn_step.h"

namespace lopt {

constexpr int kInputs = 12;  // features in the order of config.features: 4 scaled, 3 products, 4 log ms, relative log lr
constexpr int kGates = 3 * kHidden;

// Meta-parameters of the parameter level apart from biases, as lopt/backends/flat.py lays them out. Rows of `matrix`:
// features, then hidden state (for the candidates: times the reset gate). Columns: reset, update, candidate.
template <class Real>
struct PlainWeights {
  Real matrix[kInputs + kHidden][kGates];
  Real direction[kHidden], shortcut[kTimescales];
  Real attention[kHidden], attention_shortcut[kTimescales];
  Real log_lr[kHidden];
  Real log_lr_bias, momentum, offset;  // momentum after the sigmoid
};

constexpr int kReadOuts = 3 * kHidden + 2 * kTimescales + 3;  // numbers in PlainWeights behind the matrix

// What a tensor's parameters share.
template <class Number>
struct Shared {
  Number bias[kGates];  // bias plus what higher levels add
  Number relative_to, lowest, highest;  // of the log lr
  Number keep_ms[kTimescales];  // 0: the mean squares have no past
};

template <class Real>
struct Options {
  Real products, ms_eps, rms_eps;  // products: 1, or 0 without
  bool attention;
};

// Rows of the matrix products behind the gradients by the matrix: what entered the GRU, cotangents of pre-activations.
template <class Number>
struct Slab {
  Number input[kInputs], hidden[kHidden], reset_hidden[kHidden];
  Number dz[kGates];
};

// Behind the hidden state of a parameter.
template <class Number>
struct State {
  Number accum[kTimescales], ms[kTimescales], grad_decay, scale_decay, log_lr;
};

// Cotangents of the sums, per parameter.
template <class Number>
struct Summands {
  Number hidden[kHidden], input[kInputs], direction, log_lr, attention;
};

namespace LOPT_ISA {

template <class Number>
struct Adjoint {
  using M = Math<Number>;
  using Real = typename Number::Real;
  using Weights = PlainWeights<Real>;
  static constexpr Real kLog2E = Real(1.4426950408889634);
  static constexpr int kTile = kManyRegisters ? 1 : 2;  // parts in which sums are made, for them to stay in registers

  State<Number> old, now;
  Number new_hidden[kHidden];
  Number grad;
  Number decay[kTimescales], keep[kTimescales], root[kTimescales], ratio[kTimescales];  // root: 1 / sqrt(ms)
  Number reset[kHidden], update_gate[kHidden], candidate[kHidden];
  Number direction, attention, log_step, rate;  // rate: e^log_step
  Number step_factor;  // e^offset
  Number update, attention_update;

  static LOPT_HD Number sigmoid(const Number& z) { return M::ratio(1, M::exp2(M::min(z * Number(-kLog2E), 60)) + 1); }

  // out[i] += sum over j of weight[i * row + j * column] * in[j], `count` at once.
  template <int count>
  static LOPT_HD void product(Number* out, const Number* in, int terms, const Real* weight, int row, int column) {
    Number sum[count];
    LOPT_UNROLL for (int i = 0; i < count; i++) sum[i] = out[i];
    LOPT_LOOP for (int j = 0; j < terms; j++) {
      LOPT_UNROLL for (int i = 0; i < count; i++) sum[i] = M::fma(in[j], Number(weight[i * row + j * column]), sum[i]);
    }
    LOPT_UNROLL for (int i = 0; i < count; i++) out[i] = sum[i];
  }

  template <int outputs>
  static LOPT_HD void transposed(Number* out, const Number* in, int terms, const Real* weight) {
    constexpr int tile = outputs / kTile;
    LOPT_LOOP for (int i = 0; i < outputs; i += tile) product<tile>(out + i, in, terms, weight + i * kGates, kGates, 1);
  }

  // z[10 of them from `begin` on] = bias + inputs . weights
  static LOPT_HD void affine(const Weights& w, const Shared<Number>& shared, int begin, const Number* input, const Number* state, Number* z) {
    constexpr int tile = kHidden / kTile;
    LOPT_LOOP for (int j = 0; j < kHidden; j += tile) {
      LOPT_UNROLL for (int k = 0; k < tile; k++) z[j + k] = shared.bias[begin + j + k];
      product<tile>(z + j, input, kInputs, &w.matrix[0][begin + j], 1, kGates);
      product<tile>(z + j, state, kHidden, &w.matrix[kInputs][begin + j], 1, kGates);
    }
  }

  // slab.hidden is given, the rest of the slab but dz is written.
  LOPT_HD void forward(const Weights& w, const Options<Real>& o, const Shared<Number>& shared, Slab<Number>& slab) {
    const Number one(1);
    Number log_ms[kTimescales], mean(0);
    decay[0] = old.grad_decay;
    LOPT_LOOP for (int s = 0; s < kTimescales; s++) {
      if (s > 0) decay[s] = M::sqrt(decay[s - 1]);
      now.accum[s] = M::fma(decay[s], old.accum[s], (one - decay[s]) * grad);
      keep[s] = old.scale_decay * shared.keep_ms[s];
      now.ms[s] = M::fma(keep[s], old.ms[s], (one - keep[s]) * M::fma(now.accum[s], now.accum[s], Number(o.ms_eps)));
      log_ms[s] = now.ms[s] + Number(o.rms_eps);
      root[s] = M::rsqrt(log_ms[s]);
      slab.input[s] = ratio[s] = now.accum[s] * root[s];
    }
    LOPT_LOOP for (int s = 0; s < kTimescales; s++) {
      slab.input[s] = M::asinh(slab.input[s]);
      log_ms[s] = M::log(log_ms[s]);
    }
    LOPT_LOOP for (int s = 0; s < kTimescales; s++) mean = M::fma(log_ms[s], Number(Real(1) / kTimescales), mean);
    LOPT_LOOP for (int s = 0; s < kTimescales; s++) slab.input[7 + s] = log_ms[s] - mean;
    LOPT_LOOP for (int s = 0; s + 1 < kTimescales; s++) slab.input[4 + s] = slab.input[s] * slab.input[s + 1] * Number(o.products);
    slab.input[11] = old.log_lr - shared.relative_to;

    Number z[kHidden];
    affine(w, shared, 0, slab.input, slab.hidden, z);
    LOPT_LOOP for (int i = 0; i < kHidden; i++) {
      reset[i] = sigmoid(z[i]);
      slab.reset_hidden[i] = reset[i] * slab.hidden[i];
    }
    affine(w, shared, kHidden, slab.input, slab.hidden, z);
    LOPT_LOOP for (int i = 0; i < kHidden; i++) update_gate[i] = sigmoid(z[i]);
    affine(w, shared, 2 * kHidden, slab.input, slab.reset_hidden, z);
    direction = attention = attention_update = now.grad_decay = now.scale_decay = Number(0);
    log_step = old.log_lr + Number(w.log_lr_bias);
    LOPT_LOOP for (int i = 0; i < kHidden; i++) {
      candidate[i] = M::fma(Number(2), sigmoid(z[i] + z[i]), Number(-1));
      new_hidden[i] = M::fma(update_gate[i], slab.hidden[i] - candidate[i], candidate[i]);
      direction = M::fma(new_hidden[i], Number(w.direction[i]), direction);
      log_step = M::fma(new_hidden[i], Number(w.log_lr[i]), log_step);
    }
    LOPT_LOOP for (int s = 0; s < kTimescales; s++) direction = M::fma(slab.input[s], Number(w.shortcut[s]), direction);
    log_step = M::min(M::max(log_step, shared.lowest), shared.highest);
    now.log_lr = M::fma(Number(w.momentum), old.log_lr - log_step, log_step);
    rate = M::exp2(log_step * Number(kLog2E));
    update = rate * step_factor * direction;
    if (o.attention) {
      LOPT_LOOP for (int i = 0; i < kHidden; i++) attention = M::fma(new_hidden[i], Number(w.attention[i]), attention);
      LOPT_LOOP for (int s = 0; s < kTimescales; s++) attention = M::fma(slab.input[s], Number(w.attention_shortcut[s]), attention);
      attention_update = rate * attention;
    }
  }

  // After `forward`. d_hidden, d: cotangents of the new state (without decays) on entry, of the old one on return. sums:
  // cotangents of the sums. Writes slab.dz and d_relative_to, adds to `read_outs`, laid out as PlainWeights behind its matrix.
  LOPT_HD void backward(const Weights& w, const Options<Real>& o, const Shared<Number>& shared, const Summands<Number>& sums,
                        const Number& d_update, const Number& d_attention_update, Slab<Number>& slab, Number* d_hidden,
                        State<Number>& d, Number& d_relative_to, Number* read_outs) {
    const Number one(1), half(Real(0.5));
    Number d_input[kInputs], d_reset_hidden[kHidden];
    LOPT_LOOP for (int i = 0; i < kInputs; i++) d_input[i] = sums.input[i];

    // Read-outs.
    const Number d_log_lr = d.log_lr + sums.log_lr, step = rate * step_factor;
    const Number d_direction = M::fma(d_update, step, Number(2) * direction * sums.direction);
    const Number d_offset = d_update * update;
    Number d_attention(0), d_log_step = M::fma(Number(1 - w.momentum), d_log_lr, d_offset);
    if (o.attention) {
      d_attention = M::fma(d_attention_update, rate, Number(2) * attention * sums.attention);
      d_log_step = M::fma(d_attention_update, attention_update, d_log_step);
    }
    LOPT_LOOP for (int i = 0; i < kHidden; i++) {
      Number dh = d_hidden[i] + sums.hidden[i];
      dh = M::fma(d_direction, Number(w.direction[i]), dh);
      dh = M::fma(d_log_step, Number(w.log_lr[i]), dh);
      if (o.attention) dh = M::fma(d_attention, Number(w.attention[i]), dh);
      Number* out = read_outs + i;
      out[0] = M::fma(d_direction, new_hidden[i], out[0]);
      if (o.attention) out[kHidden + kTimescales] = M::fma(d_attention, new_hidden[i], out[kHidden + kTimescales]);
      out[2 * (kHidden + kTimescales)] = M::fma(d_log_step, new_hidden[i], out[2 * (kHidden + kTimescales)]);
      // GRU: h' = u h + (1 - u) c
      const Number c = candidate[i], u = update_gate[i], rest = one - u;
      slab.dz[kHidden + i] = dh * (slab.hidden[i] - c) * u * rest;
      slab.dz[2 * kHidden + i] = dh * rest * (one - c * c);
      d_hidden[i] = dh * u;
      d_reset_hidden[i] = Number(0);
    }
    LOPT_LOOP for (int s = 0; s < kTimescales; s++) {
      Number* out = read_outs + kHidden + s;
      d_input[s] = M::fma(d_direction, Number(w.shortcut[s]), d_input[s]);
      out[0] = M::fma(d_direction, slab.input[s], out[0]);
      if (o.attention) {
        d_input[s] = M::fma(d_attention, Number(w.attention_shortcut[s]), d_input[s]);
        out[kHidden + kTimescales] = M::fma(d_attention, slab.input[s], out[kHidden + kTimescales]);
      }
    }
    Number* scalars = read_outs + kReadOuts - 3;
    scalars[0] = scalars[0] + d_log_step;
    scalars[1] = M::fma(d_log_lr, old.log_lr - log_step, scalars[1]);
    scalars[2] = scalars[2] + d_offset;

    // Matrix.
    transposed<kHidden>(d_reset_hidden, slab.dz + 2 * kHidden, kHidden, &w.matrix[kInputs][2 * kHidden]);
    LOPT_LOOP for (int i = 0; i < kHidden; i++) {
      slab.dz[i] = d_reset_hidden[i] * slab.hidden[i] * reset[i] * (one - reset[i]);
      d_hidden[i] = M::fma(d_reset_hidden[i], reset[i], d_hidden[i]);
    }
    transposed<kHidden>(d_hidden, slab.dz, 2 * kHidden, &w.matrix[kInputs][0]);
    transposed<kInputs>(d_input, slab.dz, kGates, &w.matrix[0][0]);

    // Features.
    d_relative_to = Number(0) - d_input[11];
    d.log_lr = M::fma(Number(w.momentum), d_log_lr, d_log_step + d_input[11]);
    LOPT_LOOP for (int s = 0; s + 1 < kTimescales; s++) {
      const Number dp = d_input[4 + s] * Number(o.products);
      d_input[s] = M::fma(dp, slab.input[s + 1], d_input[s]);
      d_input[s + 1] = M::fma(dp, slab.input[s], d_input[s + 1]);
    }
    const Number d_mean = (d_input[7] + d_input[8] + d_input[9] + d_input[10]) * Number(Real(1) / kTimescales);
    Number d_decay(0), d_keep(0);
    LOPT_LOOP for (int s = kTimescales - 1; s >= 0; s--) {
      const Number inverse = root[s] * root[s], square = M::min(ratio[s] * ratio[s], Number(Real(1e30)));
      const Number d_ratio = d_input[s] * M::rsqrt(square + one);
      const Number d_log = M::fma(d_ratio * ratio[s], Number(Real(-0.5)), d_input[7 + s] - d_mean);
      const Number d_ms = M::fma(d_log, inverse, d.ms[s]), accum = now.accum[s];
      Number d_accum = M::fma(d_ratio, root[s], d.accum[s]);
      d_accum = M::fma(d_ms * (one - keep[s]), accum + accum, d_accum);
      d.ms[s] = d_ms * keep[s];
      d_keep = M::fma(d_ms * shared.keep_ms[s], old.ms[s] - M::fma(accum, accum, Number(o.ms_eps)), d_keep);
      d.accum[s] = d_accum * decay[s];
      d_decay = M::fma(d_accum, old.accum[s] - grad, d_decay);
      // decay[s] = sqrt(decay[s - 1]), at least 2^-60 where it is not 0.
      if (s > 0) d_decay = nonzero(M::ratio(d_decay * half, M::max(decay[s], Number(Real(1e-30)))), decay[s]);
    }
    d.grad_decay = d_decay;
    d.scale_decay = d_keep;
  }
};

}  // namespace LOPT_ISA
}  // namespace lopt
