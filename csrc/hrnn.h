// The CPU kernels of the hierarchical-RNN optimizer as plain functions: raw pointers in, nothing of torch or Python.
//
// One step is three calls, each for all tensors of a model at once: advance, summarise, apply. What they compute and in
// which order is defined by lopt/backends/reference.py; all state is float and contiguous in the parameter's memory order.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"
#include "hrnn_step.h"

namespace lopt {

struct Config {
  int tensor_size;   // hidden units of the per-tensor GRU, 0 without one
  int global_size;   // hidden units of the global GRU, 0 without one
  bool attention, shortcut, products;
  bool relative_to_problem;  // the log lr is taken relative to the mean over all tensors, otherwise over its own
  bool global_last;          // the global GRU reads the last tensor's state instead of the mean over the tensors
  float log_lr_min, log_lr_min_steps, log_lr_min_distance, log_lr_min_distance_limit;
  float log_lr_max, log_lr_max_ratio, ms_eps, rms_eps;
  float damping, damping_decay;  // the former 0 without
  float fixed_grad_decay, fixed_scale_decay;  // where they are not read out of the hidden state

  int features() const { return 2 * kTimescales + 1 + (products ? kTimescales - 1 : 0); }
  int columns() const { return kHidden + features() + 2 + attention + (damping > 0); }  // of the sums
  int directions() const { return 1 + attention; }
};

// A GRU of a higher level: weights are [inputs + size][outputs], the input's rows first.
struct Gru {
  int inputs = 0, size = 0;
  std::vector<float> gates, gates_bias;          // outputs: reset, update
  std::vector<float> candidate, candidate_bias;
  std::vector<float> injection, injection_bias;  // [global_size][3 * size]: from the global state; empty without
};

// Meta-parameters, packed for the kernels.
struct Meta {
  Config config;
  Weights<float> weights;
  float hidden_limit;  // of the compact format
  // The parameter level's injected bias, in the order and scale of `Injected`: bias + tensor state @ from_tensor + ...
  static constexpr int kOutputs = 3 * kHidden;
  float bias[kOutputs];
  std::vector<float> from_tensor;  // [tensor_size][kOutputs]
  std::vector<float> from_global;  // [global_size][kOutputs]
  Gru tensor, global;
};

// Named float arrays -> Meta. `find` returns a meta-parameter's values, or null where the configuration has none.
using Find = const float* (*)(const void* context, const char* name);
Meta pack(const Config& config, Find find, const void* context);

struct AdvanceTensor {
  const void* grad;
  Dtype dtype;  // of grad
  float sign;   // -1 climbs
  int64_t n;    // parameters here
  int64_t numel;  // parameters of the whole tensor, of which this may be a shard
  void *hidden, *accum, *ms;  // [10, n], [4, n], [4, n]; float, or as hrnn_compact.h says; updated in place
  float* log_lr;  // [n], likewise
  const float *step, *tensor_hidden, *log_lr_mean, *damping, *distance;  // the last two null without
};

struct Advance {
  const Meta* meta;
  bool compact;  // the format of the state
  const AdvanceTensor* tensors;
  int count;
  const float* global_hidden;  // [global_size]
  const float* grad_scale;     // [] what gradients were multiplied with, or null
  float* skip;                 // [] 0: go ahead; gains 1 at a non-finite gradient
  float *update, *attention_update;  // [sum of n]
  float* sums;                       // [count][columns]
  int threads;
};

struct SummariseTensor {
  int64_t numel;
  float *tensor_hidden, *log_lr_mean, *damping, *distance, *step;  // damping and distance null without
  float lr;
};

struct Summarise {
  const Meta* meta;
  const float* sums;
  const SummariseTensor* tensors;
  int count;
  float* global_hidden;
  const float* update;    // [sum of sizes]
  const int64_t* places;  // [count][kSamples] where in it sampled parameters stand, null without distances
  const float* skip;
  float* scale;  // [count][directions]
};

struct ApplyTensor {
  void* param;
  Dtype dtype;       // of param and true_param
  int64_t n;
  float* true_param;  // with attention: the optimized point, while param holds the attended one
  const float* log_lr_mean;
  float lr, weight_decay;
};

struct Apply {
  const ApplyTensor* tensors;
  int count;
  const float *update, *attention_update;  // the latter null without attention
  const float* scale;                      // [count][1, with attention 2]
  const float* skip;
  int threads;
};

// One set per instruction set, in the namespace of its name.
struct Kernels {
  void (*advance)(const Advance&);
  void (*summarise)(const Summarise&);
  void (*apply)(const Apply&);
  // For tests: a function of simd.h over an array; "exp2", "log", "rsqrt", "reciprocal", "asinh", or a round trip through
  // "bf16", "f16". Returns false for an unknown name.
  bool (*map)(const char* name, const float* from, float* to, int64_t n);
};

}  // namespace lopt
