// The GPU kernels of the hierarchical-RNN optimizer as plain functions: raw pointers in, nothing of torch or Python.
//
// One step is three calls, each for all tensors of a model at once. What they compute and in which order is defined by
// lopt/backends/reference.py. Tensors are reached through tables of addresses and numbers, int64 [columns, tensors] in device
// memory, whose columns are those of lopt/backends/gpu.py. A call launches and returns: it neither waits nor allocates.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lopt::gpu {

#define LOPT_ADVANCE_COLUMNS(X)                                                                                        \
  X(GRAD) X(GRAD_DTYPE) X(SIGN) X(HIDDEN) X(ACCUM) X(MS) X(LOG_LR) X(STEP) X(TENSOR_HIDDEN) X(LOG_LR_MEAN) X(DAMPING)  \
  X(DISTANCE) X(SIZE) X(NUMEL) X(OFFSET) X(CHUNK_FIRST) X(CHUNK_COUNT) X(CHUNK_SIZE)
#define LOPT_SUMMARY_COLUMNS(X)                                                                                        \
  X(TENSOR_HIDDEN) X(LOG_LR_MEAN) X(DAMPING) X(DISTANCE) X(STEP) X(NUMEL) X(LR) X(LR_DTYPE)
#define LOPT_APPLY_COLUMNS(X)                                                                                          \
  X(PARAM) X(PARAM_DTYPE) X(TRUE_PARAM) X(LOG_LR_MEAN) X(SIZE) X(OFFSET) X(CHUNK_FIRST) X(CHUNK_SIZE) X(LR)            \
  X(LR_DTYPE) X(WEIGHT_DECAY)
#define LOPT_COLUMN(name) name,
struct AdvanceColumn { enum { LOPT_ADVANCE_COLUMNS(LOPT_COLUMN) COUNT }; };
struct SummaryColumn { enum { LOPT_SUMMARY_COLUMNS(LOPT_COLUMN) COUNT }; };
struct ApplyColumn { enum { LOPT_APPLY_COLUMNS(LOPT_COLUMN) COUNT }; };
#undef LOPT_COLUMN

constexpr int kPartials = 32;        // row length of the partial sums, at least their number
constexpr int kLargestLevel = 1024;  // hidden units of a tensor or global GRU
constexpr int kOutputs = 30;         // of the parameter GRU: reset gates, update gates, candidates
#ifndef LOPT_GPU_PACK
#define LOPT_GPU_PACK 4  // 2 compiles too, for less code and fewer registers: bench/gpu.sh compares
#endif
constexpr int kPack = LOPT_GPU_PACK;  // parameters that a thread of `advance` handles together
constexpr int kTile = 512;           // parameters: chunks are multiples of it

struct Advance {
  const int64_t* table;   // [AdvanceColumn::COUNT, tensors]
  const int32_t* chunks;  // [chunk_count], each one's tensor
  int tensors, chunk_count;
  const float* weights;  // Weights<float> of hrnn_step.h, the products' zero where the configuration has none
  // [30]; [tensor_size, 30]; [global_size, 30]: what is injected into the parameter level, in the order of `Injected`
  const float *bias, *from_tensor, *from_global;
  const float* global_hidden;  // [global_size]
  int tensor_size, global_size;
  bool relative_to_problem, attention, products, damped;
  bool compact;        // the format of the state
  float hidden_limit;  // of the compact format
  float gradient_limit;
  const float* grad_scale;  // [] what gradients were multiplied with, or null
  float* skip;              // [] 0: go ahead; becomes 1 at a gradient beyond the limit
  float* injected;          // [tensors], Injected<float> of hrnn_step.h, scratch
  float *update, *attention_update;  // [sum of sizes], the latter null without attention
  float* partials;                   // [chunk_count, kPartials], scratch
  int32_t* tickets;                  // [tensors], 0 before and after
  float* sums;                       // [tensors, columns]
};

struct Summarise {
  const int64_t* table;  // [SummaryColumn::COUNT, tensors]
  int tensors;
  const float* sums;
  const float *tensor_weights, *global_weights;  // gates, bias, candidate, bias (, injection, bias); see `MetaParams.flat`
  int inputs, columns, squares;  // inputs of the tensor GRU; row length of sums, and where direction^2 stands in it
  int tensor_size, global_size;
  bool attention, global_last;
  float direction_eps;
  float damping, damping_decay, gradient_limit;  // damping 0 without
  float* global_hidden;
  const float* update;    // [sum of sizes]
  const int64_t* places;  // [tensors, kSamples] where in it sampled parameters stand, null without distances
  const float* skip;
  float* scale;     // [tensors, 1 or 2]
  float* states;    // [tensors, tensor_size], scratch
  int32_t* ticket;  // [], 0 before and after
};

struct Apply {
  const int64_t* table;  // [ApplyColumn::COUNT, tensors]
  const int32_t* chunks;
  int tensors, chunk_count;
  const float *update, *attention_update;  // the latter null without attention
  const float* scale;
  const float* skip;
};

// Each returns null, or what is wrong. `stream` is a cudaStream_t. `check` launches nothing: it asks whether the current
// device and its driver can run what was compiled.
struct Launches {
  const char* (*advance)(const Advance&, void* stream);
  const char* (*summarise)(const Summarise&, void* stream);
  const char* (*apply)(const Apply&, void* stream);
  const char* (*check)();
};

extern const Launches cuda;      // where nvcc was found; the current device's
extern const Launches emulated;  // the same code on the host, thread after thread, on memory of the host: for tests

}  // namespace lopt::gpu
