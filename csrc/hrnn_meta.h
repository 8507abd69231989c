// The parameter level of many models in lock-step, and its derivative: what meta-training differentiates.
//
// R rows are models of n parameters in T tensors. Arrays are [R][features][n] or [R][T][columns], float or double, contiguous.
#pragma once

#include <cstdint>

namespace lopt {

struct MetaState {
  void *hidden, *accum, *ms, *grad_decay, *scale_decay, *log_lr;  // [R][10, 4, 4, 1, 1, 1][n]
};

struct MetaStep {
  int64_t rows, n, tensors;
  const int32_t* owner;   // [n] which tensor a parameter belongs to
  const int64_t* begins;  // [T + 1]
  bool products, attention;
  double ms_eps, rms_eps;
  int64_t weight_stride;  // between rows' weights, 0: all rows share them
  const void* weights;    // PlainWeights
  const void *injected, *relative_to, *lowest, *highest;  // [R][T][30], then [R][T]
  const void* grad;                    // [R][n]
  MetaState old;
  int threads;
};

struct MetaForward {
  MetaStep step;
  MetaState now;  // written; its decays are not
  void *update, *attention_update, *sums;  // written: [R][n], [R][n], [R][T][columns]
};

struct MetaBackward {
  MetaStep step;
  // Cotangents; null: zero.
  MetaState now;  // its decays are ignored
  const void *update, *attention_update, *sums;
  // Written.
  MetaState d_old;
  void *d_weights, *d_injected, *d_relative_to;
};

struct MetaKernels {
  void (*forward[2])(const MetaForward&);  // of float, of double
  void (*backward[2])(const MetaBackward&);
};

}  // namespace lopt
