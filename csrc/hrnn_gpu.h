// The blocks of the GPU kernels: what one block of threads does, for the GPU and, to check it there, for the host.
//
//     prepare     looks for non-finite gradients; per tensor: injected bias and what else the parameters of a tensor share
//     advance     per parameter, by hrnn_step.h; the last chunk of a tensor to finish adds up the tensor's sums
//     summarise   per tensor: GRU over the means; the last tensor to finish runs the global GRU
//     apply       per parameter: move, decay the weights
//
// Cut: every tensor into chunks of a few tiles, a block per chunk (per tensor in `summarise`). In a tile each thread has kPack
//   neighbouring parameters if the tensor's size is a multiple of that and its state aligned: 16-byte loads and stores for 4 of
//   them. Otherwise it has one. `advance` takes the chunks backwards: what the kernel before it touched last may still be in the
//   cache.
// Arithmetic: with float32 state memory binds, and each thread multiplies for itself. With a compact state instructions would,
//   and tensor cores take over the GRU's products, half of them, where kPack parameters to a thread fill a warp: inputs rounded
//   to float16, weights to 22 bits. That moves updates by 1e-4 to 4e-4 of their size, the state's format by 1e-3. Everything else,
//   directions and decays included, stays in float32; so do products with weights beyond float16.
// Memory, in bytes per parameter with a float gradient and parameter: prepare 4 (the gradient), advance 160 (gradient 4, state
//   in and out 2 * 76, update 4) or with a compact state 88, apply 12. Meta-parameters are in shared memory and read four at a
//   time, as broadcasts.
// Sums over a tensor are of partial sums per chunk, in the order of the chunks: two runs are bitwise equal.
//
// Registers and instructions: `python -m lopt.bench.sass`. Tests: tests/kernels/test_hrnn.py. Time: bench/gpu.sh.
#pragma once

#include <cstddef>
#include <type_traits>

#include "gpu_mma.h"
#include "hrnn_compact.h"
#include "hrnn_cuda.h"

namespace lopt::LOPT_ISA {

using gpu::AdvanceColumn;
using gpu::ApplyColumn;
using gpu::SummaryColumn;

using gpu::kPack;
constexpr int kAligned = 4 * kPack;   // bytes of them in a row of floats
constexpr int kAdvanceThreads = 128;  // of a block
constexpr int kAdvanceBlocks = kPack == 4 ? 2 : 3;  // of a multiprocessor, at least: as many as registers allow, see bench/sass.py
constexpr int kStreamThreads = 256;  // of the kernels that only pass over memory
constexpr int kSummaryThreads = 256;
constexpr int kSums = kHidden + kFeatures + 4;  // in the order of `Io`

// A block of threads. `each` calls f(thread) for all of them and then waits for all: on a GPU every thread calls it once, on
// the host a loop does. What one call leaves to the next is in memory that the threads share.
template <int threads_>
struct Block {
  static constexpr int threads = threads_;
  int index;

  template <class Function>
  LOPT_HD void each(Function f) const {
#ifdef __CUDA_ARCH__
    f(int(threadIdx.x));
    __syncthreads();
#else
    for (int thread = 0; thread < threads; thread++) f(thread);
#endif
  }

  // The same for the warps: f(warp), which all threads of the warp call together.
  template <class Function>
  LOPT_HD void each_warp(Function f) const {
#ifdef __CUDA_ARCH__
    f(Warp{int(threadIdx.x) / kLanes});
    __syncthreads();
#else
    for (int warp = 0; warp < threads / kLanes; warp++) f(Warp{warp});
#endif
  }
};

// Whether all other of `count` blocks have drawn a ticket; what they wrote before is then visible to `load_fresh`.
template <class B>
LOPT_HD bool last_to_finish(const B& block, int32_t* ticket, int64_t count, bool& last) {
  block.each([&](int thread) {
    if (thread != 0) return;
#ifdef __CUDA_ARCH__
    __threadfence();
    last = atomicAdd(ticket, 1) == count - 1;
    __threadfence();
#else
    last = (*ticket)++ == count - 1;
#endif
    if (last) *ticket = 0;
  });
  return last;
}

// P neighbouring values in memory, read and written by one instruction.
template <class T, int P>
struct alignas(sizeof(T) * P) Neighbours {
  T value[P];
};

// Accesses to device memory, and to what is touched once in a step and should not drive gradients and updates out of the
// cache, and to what other blocks may have written within this launch.
#ifdef __CUDA_ARCH__
template <int bytes> struct Word;
template <> struct Word<2> { using Type = unsigned short; };
template <> struct Word<4> { using Type = unsigned int; };
template <> struct Word<8> { using Type = uint2; };
template <> struct Word<16> { using Type = uint4; };
#define LOPT_LOAD(name, instruction)                                                                     \
  template <class T>                                                                                     \
  LOPT_HD T name(const T* from) {                                                                        \
    const auto word = instruction(reinterpret_cast<const typename Word<sizeof(T)>::Type*>(from));        \
    T value;                                                                                             \
    std::memcpy(&value, &word, sizeof value);                                                            \
    return value;                                                                                        \
  }
#define LOPT_STORE(name, instruction)                                                                    \
  template <class T>                                                                                     \
  LOPT_HD void name(T* to, const T& value) {                                                             \
    typename Word<sizeof(T)>::Type word;                                                                 \
    std::memcpy(&word, &value, sizeof value);                                                            \
    instruction(reinterpret_cast<typename Word<sizeof(T)>::Type*>(to), word);                            \
  }
#else
// By memcpy: GCC 14 takes the alignment of one branch's access for the other's, too.
#define LOPT_LOAD(name, instruction)                                   \
  template <class T>                                                   \
  LOPT_HD T name(const T* from) {                                      \
    T value;                                                           \
    std::memcpy(&value, static_cast<const void*>(from), sizeof value); \
    return value;                                                      \
  }
#define LOPT_STORE(name, instruction) \
  template <class T>                  \
  LOPT_HD void name(T* to, const T& value) { std::memcpy(static_cast<void*>(to), &value, sizeof value); }
#endif
LOPT_LOAD(load_global, __ldca)
LOPT_LOAD(load_once, __ldcs)
LOPT_LOAD(load_fresh, __ldcg)
LOPT_STORE(store_global, __stwb)
LOPT_STORE(store_once, __stcs)
#undef LOPT_LOAD
#undef LOPT_STORE

LOPT_HD bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// One number of any dtype as float.
LOPT_HD float load_any(Dtype dtype, const void* from, int64_t at) {
  switch (dtype) {
    case Dtype::f32: return load_global(static_cast<const float*>(from) + at);
    case Dtype::f64: return float(load_global(static_cast<const double*>(from) + at));
    case Dtype::bf16: return from_bf16(load_global(static_cast<const uint16_t*>(from) + at));
    default: return from_f16(load_global(static_cast<const uint16_t*>(from) + at));
  }
}

LOPT_HD void store_any(Dtype dtype, void* to, int64_t at, float value) {
  switch (dtype) {
    case Dtype::f32: return store_global(static_cast<float*>(to) + at, value);
    case Dtype::f64: return store_global(static_cast<double*>(to) + at, double(value));
    case Dtype::bf16: return store_global(static_cast<uint16_t*>(to) + at, to_bf16(value));
    default: return store_global(static_cast<uint16_t*>(to) + at, to_f16(value));
  }
}

// P neighbouring numbers, in one access where they are aligned.
template <int P>
LOPT_HD Pack<float, P> load_pack(Dtype dtype, const void* from, int64_t at) {
  Pack<float, P> value;
  const float* const floats = static_cast<const float*>(from) + at;
  const uint16_t* const halves = static_cast<const uint16_t*>(from) + at;
  if (dtype == Dtype::f32 && aligned(floats, 4 * P)) {
    const auto all = load_global(reinterpret_cast<const Neighbours<float, P>*>(floats));
    LOPT_UNROLL for (int p = 0; p < P; p++) value.part[p] = all.value[p];
  } else if (P > 1 && (dtype == Dtype::bf16 || dtype == Dtype::f16) && aligned(halves, 2 * P)) {
    const auto all = load_global(reinterpret_cast<const Neighbours<uint16_t, P>*>(halves));
    LOPT_UNROLL for (int p = 0; p < P; p++)
      value.part[p] = dtype == Dtype::bf16 ? from_bf16(all.value[p]) : from_f16(all.value[p]);
  } else {
    LOPT_UNROLL for (int p = 0; p < P; p++) value.part[p] = load_any(dtype, from, at + p);
  }
  return value;
}

template <int P>
LOPT_HD void store_pack(Dtype dtype, void* to, int64_t at, const Pack<float, P>& value) {
  float* const floats = static_cast<float*>(to) + at;
  uint16_t* const halves = static_cast<uint16_t*>(to) + at;
  if (dtype == Dtype::f32 && aligned(floats, 4 * P)) {
    Neighbours<float, P> all;
    LOPT_UNROLL for (int p = 0; p < P; p++) all.value[p] = value.part[p];
    store_global(reinterpret_cast<Neighbours<float, P>*>(floats), all);
  } else if (P > 1 && (dtype == Dtype::bf16 || dtype == Dtype::f16) && aligned(halves, 2 * P)) {
    Neighbours<uint16_t, P> all;
    LOPT_UNROLL for (int p = 0; p < P; p++) all.value[p] = dtype == Dtype::bf16 ? to_bf16(value.part[p]) : to_f16(value.part[p]);
    store_global(reinterpret_cast<Neighbours<uint16_t, P>*>(halves), all);
  } else {
    LOPT_UNROLL for (int p = 0; p < P; p++) store_any(dtype, to, at + p, value.part[p]);
  }
}

// A row of a table.
struct Row {
  const int64_t* table;
  int tensors, tensor;
  LOPT_HD int64_t number(int column) const { return table[int64_t(column) * tensors + tensor]; }
  template <class T>
  LOPT_HD T* address(int column) const { return reinterpret_cast<T*>(number(column)); }
  LOPT_HD double real(int column) const {
    const int64_t bits = number(column);
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

// Parameters [begin, end) of a tensor.
struct Range {
  int64_t begin, end;
};

template <class Column>
LOPT_HD Range chunk_range(const Row& row, int chunk) {
  const int64_t size = row.number(Column::CHUNK_SIZE), begin = (chunk - row.number(Column::CHUNK_FIRST)) * size;
  const int64_t n = row.number(Column::SIZE), end = begin + size;
  return {begin, end < n ? end : n};
}

LOPT_HD float gradient_factor(const gpu::Advance& args, const Row& row) {
  const float sign = row.number(AdvanceColumn::SIGN);
  return args.grad_scale ? sign * (1 / *args.grad_scale) : sign;
}

// ---------------------------------------------------------------- prepare

struct PrepareShared {
  double weighted[kStreamThreads], numel[kStreamThreads];
  int past;
};

// sum + column j of x [inputs] @ weight [inputs, outputs]
LOPT_HD float add_column(float sum, const float* x, const float* weight, int inputs, int outputs, int j) {
  for (int i = 0; i < inputs; i++) sum = fmaf(x[i], weight[int64_t(i) * outputs + j], sum);
  return sum;
}

// A tensor's row of `injected`, from the tensor and global states before the step.
template <class B>
LOPT_HD void share(const B& block, const gpu::Advance& args, PrepareShared& shared) {
  const Row row{args.table, args.tensors, block.index};
  Injected<float>& injected = reinterpret_cast<Injected<float>*>(args.injected)[block.index];
  block.each([&](int thread) {
    if (thread < gpu::kOutputs) {
      const float* q = row.address<const float>(AdvanceColumn::TENSOR_HIDDEN);
      float sum = add_column(args.bias[thread], q, args.from_tensor, args.tensor_size, gpu::kOutputs, thread);
      sum = add_column(sum, args.global_hidden, args.from_global, args.global_size, gpu::kOutputs, thread);
      injected.bias[thread / kColumns][thread % kColumns] = sum;
    }
    double weighted = 0, numel = 0;
    if (args.relative_to_problem)
      for (int i = thread; i < args.tensors; i += B::threads) {
        const Row other{args.table, args.tensors, i};
        const double count = other.number(AdvanceColumn::NUMEL);
        weighted += count * *other.address<const float>(AdvanceColumn::LOG_LR_MEAN);
        numel += count;
      }
    shared.weighted[thread] = weighted;
    shared.numel[thread] = numel;
  });
  for (int half = B::threads / 2; half > 0; half /= 2)
    block.each([&](int thread) {
      if (thread >= half) return;
      shared.weighted[thread] += shared.weighted[thread + half];
      shared.numel[thread] += shared.numel[thread + half];
    });
  const Weights<float>& weights = *reinterpret_cast<const Weights<float>*>(args.weights);
  const float* const damping = args.damped ? row.address<const float>(AdvanceColumn::DAMPING) : nullptr;
  const float factor = damping ? damping[kFactor] : 1;
  const float step = *row.address<const float>(AdvanceColumn::STEP);
  const bool started = has_started(step, damping);
  const int64_t n = row.number(AdvanceColumn::SIZE);
  bool keeps_all = true;
  for (int s = 0; s < kTimescales; s++) {
    const auto has_past = [&](int64_t i) {
      if (args.compact) return row.address<const int16_t>(AdvanceColumn::MS)[s * n + i] != kMsZero;
      return row.address<const float>(AdvanceColumn::MS)[s * n + i] != 0;
    };
    bool keeps = false;
    for (int64_t begin = 0; started && !keeps && begin < n; begin += B::threads) {  // as a rule, the first value decides
      block.each([&](int thread) {
        if (thread == 0) shared.past = 0;
      });
      block.each([&](int thread) {
        if (begin + thread < n && has_past(begin + thread)) shared.past = 1;  // all who write, write the same
      });
      keeps = shared.past;
      block.each([](int) {});  // all have read it
    }
    keeps_all &= keeps || !started;
    block.each([&](int thread) {
      if (thread == 0) injected.keep_ms[s] = keeps;
    });
  }
  block.each([&](int thread) {
    if (thread != 0) return;
    injected.keeps_all = keeps_all;
    injected.started = started;
    const float mean = *row.address<const float>(AdvanceColumn::LOG_LR_MEAN);
    injected.lowest = lowest_log_lr(weights, step, row.address<const float>(AdvanceColumn::DISTANCE));
    injected.highest = highest_log_lr(weights, injected.lowest, mean);
    injected.rising_momentum = rising_momentum(weights.momentum, factor);
    injected.relative_to = args.relative_to_problem ? shared.weighted[0] / shared.numel[0] : mean;
  });
}

// Blocks below `tensors` each serve a tensor; the others each look at the gradients of a chunk.
template <class B>
LOPT_HD void prepare(const B& block, const gpu::Advance& args, PrepareShared& shared) {
  if (block.index < args.tensors) return share(block, args, shared);
  const int chunk = block.index - args.tensors;
  const Row row{args.table, args.tensors, args.chunks[chunk]};
  const Range range = chunk_range<AdvanceColumn>(row, chunk);
  const void* grad = row.address<const void>(AdvanceColumn::GRAD);
  const Dtype dtype = Dtype(row.number(AdvanceColumn::GRAD_DTYPE));
  const float factor = gradient_factor(args, row), limit = args.gradient_limit;
  block.each([&](int thread) {
    bool within = true;
    const auto look = [&](float value) { within &= fabsf(value * factor) <= limit; };  // false for NaN
    int64_t at = range.begin + 4 * thread;
    constexpr int kAhead = 4;  // loads in flight: what is looked at one by one waits for memory each time
    for (; at + 4 + (kAhead - 1) * 4 * B::threads <= range.end; at += kAhead * 4 * B::threads) {
      Pack<float, 4> fours[kAhead];
      LOPT_UNROLL for (int i = 0; i < kAhead; i++) fours[i] = load_pack<4>(dtype, grad, at + i * 4 * B::threads);
      LOPT_UNROLL for (int i = 0; i < kAhead; i++) LOPT_UNROLL for (int p = 0; p < 4; p++) look(fours[i].part[p]);
    }
    for (; at + 4 <= range.end; at += 4 * B::threads) {
      const Pack<float, 4> four = load_pack<4>(dtype, grad, at);
      LOPT_UNROLL for (int p = 0; p < 4; p++) look(four.part[p]);
    }
    for (; at < range.end; at++) look(load_any(dtype, grad, at));  // of one thread
    if (!within) *args.skip = 1;  // all who write, write the same
  });
}

// ---------------------------------------------------------------- advance

// The GRU's products on tensor cores: inputs are rounded to float16, a weight is the sum of two float16, 22 bits. Both lie in
// shared memory as 8 x 8 matrices, whose rows are parameters and columns of weights. Per 8 columns of weights there are six,
// in pairs: inputs 0 to 15 of the first float16, the same of the second, inputs 16 to 23 of the first and of the second.
constexpr int kInputs = kHidden + kFeatures;  // followed by a 1, of which the bias is the weight
constexpr int kSlots = 24;                    // inputs, 1, 0, 0
constexpr int kMatrices = 2 * kSlots / 8;
constexpr int kGateMatrices = 20;  // of 24 columns 18, and then a multiple of the four that are read at once
constexpr int kCandidateMatrices = 12;

struct alignas(16) HalfWeights {
  uint16_t matrix[kGateMatrices + kCandidateMatrices][8][8];
  bool fit;  // all weights are in the range of float16, and so are hidden states
};

// What the lanes of a warp multiply together: inputs of each lane's p-th parameter, and a row for each lane of the result.
struct alignas(16) Exchange {
  uint16_t inputs[kPack][kSlots / 8][kLanes][8];
  float outputs[kLanes * kSlots];

  // Every other four rows are moved by four numbers: lanes that access rows or parts of rows then do not meet in a bank.
  LOPT_HD float* output(int row, int column) { return outputs + kSlots * row + 4 * (row / 4 % 2) + column; }
};

template <bool compact>
struct WarpShared {
  float sums[kSums][kLanes];
};
template <>
struct WarpShared<true> {
  union {
    Exchange exchange;
    float sums[kSums][kLanes];  // in the end
  };
};

struct Nothing {};

template <bool compact>
struct AdvanceShared {
  Weights<float> weights;
  Injected<float> injected;
  std::conditional_t<compact, HalfWeights, Nothing> halves;
  WarpShared<compact> warps[kAdvanceThreads / kLanes];
  float parts[kSums][kAdvanceThreads / kLanes], totals[kSums];
  double rows[kAdvanceThreads / 8][gpu::kPartials];
  bool last;
};

struct Tensor {
  const void* grad;
  Dtype dtype;
  float factor, hidden_limit;
  void *hidden, *accum, *ms;  // float, or as hrnn_compact.h says
  float *log_lr, *update, *attention_update;
  int64_t n;
};

// Input and output of P neighbouring parameters from `at` on, but for what the two formats of state differ in. All is read
// at once: the loads are under way together.
template <int P>
struct CommonIo {
  using Number = Pack<float, P>;
  const Tensor& t;
  int64_t at;
  float (&sums)[kSums];
  Number old_grad, old_log_lr;

  LOPT_HD CommonIo(const Tensor& t, int64_t at, float (&sums)[kSums]) : t(t), at(at), sums(sums) {
    old_grad = load_pack<P>(t.dtype, t.grad, at) * t.factor;
    old_log_lr = read(t.log_lr, 0);
  }

  template <class T>
  LOPT_HD Neighbours<T, P> load(const void* state, int feature) const {
    return load_once(reinterpret_cast<const Neighbours<T, P>*>(static_cast<const T*>(state) + feature * t.n + at));
  }
  template <class T>
  LOPT_HD void store(void* state, int feature, const Neighbours<T, P>& values) const {
    store_once(reinterpret_cast<Neighbours<T, P>*>(static_cast<T*>(state) + feature * t.n + at), values);
  }
  LOPT_HD Number read(const void* state, int feature) const {
    const auto all = load<float>(state, feature);
    Number value;
    LOPT_UNROLL for (int p = 0; p < P; p++) value.part[p] = all.value[p];
    return value;
  }
  LOPT_HD void write(void* state, int feature, const Number& value) const {
    Neighbours<float, P> all;
    LOPT_UNROLL for (int p = 0; p < P; p++) all.value[p] = value.part[p];
    store(state, feature, all);
  }
  LOPT_HD void add(int sum, const Number& value) const {
    float total = value.part[0];
    LOPT_UNROLL for (int p = 1; p < P; p++) total += value.part[p];
    sums[sum] += total;
  }

  LOPT_HD Number grad() const { return old_grad; }
  LOPT_HD Number log_lr() const { return old_log_lr; }
  LOPT_HD void put_feature(int i, const Number& value) { add(kHidden + i, value); }
  LOPT_HD void put_log_lr(const Number& value) { write(t.log_lr, 0, value), add(kHidden + kFeatures + 1, value); }
  LOPT_HD void put_grad(const Number& value) { add(kHidden + kFeatures + 3, value * value); }
  LOPT_HD void put_update(const Number& direction, const Number& update) {
    store_pack(Dtype::f32, t.update, at, update), add(kHidden + kFeatures, direction * direction);
  }
  LOPT_HD void put_attention(const Number& direction, const Number& update) {
    store_pack(Dtype::f32, t.attention_update, at, update), add(kHidden + kFeatures + 2, direction * direction);
  }
};

template <int P>
struct Io : CommonIo<P> {
  using Number = Pack<float, P>;
  static constexpr int bytes = 4 * P;  // of an access
  Number old_hidden[kHidden], old_accum[kTimescales], old_ms[kTimescales];

  LOPT_HD Io(const Tensor& t, int64_t at, float (&sums)[kSums]) : CommonIo<P>(t, at, sums) {
    LOPT_UNROLL for (int i = 0; i < kHidden; i++) old_hidden[i] = this->read(t.hidden, i);
    LOPT_UNROLL for (int s = 0; s < kTimescales; s++) old_accum[s] = this->read(t.accum, s);
    LOPT_UNROLL for (int s = 0; s < kTimescales; s++) old_ms[s] = this->read(t.ms, s);
  }

  LOPT_HD Number hidden(int i) const { return old_hidden[i]; }
  LOPT_HD Number accum(int s) const { return old_accum[s]; }
  LOPT_HD Number ms(int s) const { return old_ms[s]; }
  LOPT_HD void put_hidden(int i, const Number& value) { this->write(this->t.hidden, i, value), this->add(i, value); }
  LOPT_HD void put_accum(int s, const Number& value) { this->write(this->t.accum, s, value); }
  LOPT_HD void put_ms(int s, const Number& value) { this->write(this->t.ms, s, value); }
};

// With a compact state. Averages and mean squares come in pairs, the average first.
template <int P>
struct CompactIo : CommonIo<P> {
  using Number = Pack<float, P>;
  using C = Compact<Number>;
  static constexpr int bytes = 2 * P;
  Neighbours<int16_t, P> old_hidden[kHidden], old_ms[kTimescales];
  Neighbours<uint16_t, P> old_ratio[kTimescales];
  Number root_ms, accum_waiting;

  LOPT_HD CompactIo(const Tensor& t, int64_t at, float (&sums)[kSums]) : CommonIo<P>(t, at, sums) {
    LOPT_UNROLL for (int i = 0; i < kHidden; i++) old_hidden[i] = this->template load<int16_t>(t.hidden, i);
    LOPT_UNROLL for (int s = 0; s < kTimescales; s++) old_ratio[s] = this->template load<uint16_t>(t.accum, s);
    LOPT_UNROLL for (int s = 0; s < kTimescales; s++) old_ms[s] = this->template load<int16_t>(t.ms, s);
  }

  static LOPT_HD Number number(const Neighbours<int16_t, P>& codes) {
    Number value;
    LOPT_UNROLL for (int p = 0; p < P; p++) value.part[p] = codes.value[p];
    return value;
  }
  // `steps` to the nearest whole number, which is in the lowest bits once the sum has none for fractions: |steps| < 2^15.
  LOPT_HD void write_code(void* state, int feature, const Number& steps) const {
    Neighbours<int16_t, P> codes;
    LOPT_UNROLL for (int p = 0; p < P; p++) codes.value[p] = int16_t(bits_of(steps.part[p] + 0x1.8p+23f));
    this->store(state, feature, codes);
  }

  LOPT_HD Number hidden(int i) const { return C::hidden(number(old_hidden[i]), this->t.hidden_limit); }
  LOPT_HD Number accum(int s) {
    Number ratio;
    LOPT_UNROLL for (int p = 0; p < P; p++) ratio.part[p] = from_f16(old_ratio[s].value[p]);
    root_ms = C::root_ms(number(old_ms[s]));
    return ratio * root_ms;
  }
  LOPT_HD Number ms(int) const { return root_ms * root_ms; }  // one power of two less
  LOPT_HD void put_hidden(int i, const Number& value) {
    write_code(this->t.hidden, i, C::hidden_steps(value, this->t.hidden_limit)), this->add(i, value);
  }
  LOPT_HD void put_accum(int, const Number& value) { accum_waiting = value; }
  LOPT_HD void put_ms(int s, const Number& value) {
    const Number code = C::ms_code(value), ratio = C::ratio(accum_waiting, code);
    Neighbours<uint16_t, P> halves;
    LOPT_UNROLL for (int p = 0; p < P; p++) halves.value[p] = to_f16(ratio.part[p]);
    write_code(this->t.ms, s, code), this->store(this->t.accum, s, halves);
  }
};

struct Sums {
  float value[kSums];
};

// Parameters of `range`, P to a thread.
template <class V, class I, int P, int threads, class Shared>
LOPT_HD void advance_each(const Shared& shared, const Tensor& tensor, const Range& range, int thread, Sums& sums) {
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (int64_t at = range.begin + P * thread; at < range.end; at += P * threads) {
    I io(tensor, at, sums.value);
    Step<Pack<float, P>, V, I>(shared.weights, shared.injected, io).advance();
  }
}

// Fills `halves` from the weights and the tensor's bias.
LOPT_HD void split_weights(AdvanceShared<true>& shared, float hidden_limit, int thread, int threads) {
  if (!(hidden_limit <= kLargestHalf)) shared.halves.fit = false;  // all who write, write the same
  for (int at = thread; at < (kGateMatrices + kCandidateMatrices) * 64; at += threads) {
    const bool gate = at / 64 < kGateMatrices;
    const int matrix = gate ? at / 64 : at / 64 - kGateMatrices, pair = matrix % kMatrices / 2, second = matrix % 2;
    const int slot = 8 * (pair < 2 ? second : 2) + at % 8, column = matrix / kMatrices * 8 + at / 8 % 8;
    float value = 0;
    if (column < (gate ? 2 * kHidden : kHidden)) {
      const int group = (gate ? 0 : 2 * kGroups) + column / kColumns;
      const int input = gate ? slot : slot < kHidden ? slot + kFeatures : slot - kHidden;  // here the state is always first
      if (slot < kInputs) value = shared.weights.gru[group][input][column % kColumns];
      if (slot == kInputs) value = shared.injected.bias[group][column % kColumns];
    }
    if (!(fabsf(value) <= kLargestHalf)) shared.halves.fit = false;
    const uint16_t first = to_f16(value);
    shared.halves.matrix[at / 64][at / 8 % 8][at % 8] = (pair < 2 ? pair : second) ? to_f16(value - from_f16(first)) : first;
  }
}

// `Step::multiply_gates` or `Step::multiply_candidates` for the parameters of a warp. No input is beyond float16:
//   - hidden states are at most `hidden_limit`, which `fit` has tested, with and without a reset gate;
//   - scaled averages are at most 43, as `Math::asinh` is, and products of two of them 1,849;
//   - log mean squares and log lr, which nothing bounds, are bounded here.
template <bool candidates, int P, class S>
LOPT_HD void multiply(const Warp& warp, AdvanceShared<true>& shared, PerLane<S>& step) {
  constexpr int first = candidates ? 2 * kHidden : 0, columns = candidates ? kHidden : 2 * kHidden, tiles = (columns + 7) / 8;
  Exchange& exchange = shared.warps[warp.index].exchange;
  warp.each([&](int lane) {
    LOPT_UNROLL for (int p = 0; p < P; p++) {
      const auto number = [&](int input) { return step[lane].input[input].part[p]; };
      const auto put = [&](int slot, uint32_t pair) {
        std::memcpy(&exchange.inputs[p][slot / 8][lane][slot % 8], &pair, sizeof pair);
      };
      constexpr int state = candidates ? kInputs : 0;
      LOPT_UNROLL for (int i = 0; i < kHidden; i += 2) put(i, pair_of_halves(number(state + i), number(state + i + 1)));
      if constexpr (!candidates) {  // for which the others are still there
        LOPT_UNROLL for (int i = kHidden; i + 1 < kInputs; i += 2) {
          const bool unbounded = i >= kHidden + kLogMs && i < kHidden + kProducts;
          put(i, unbounded ? pair_of_bounded_halves(number(i), number(i + 1)) : pair_of_halves(number(i), number(i + 1)));
        }
        put(kInputs - 1, pair_of_halves(number(kInputs - 1), 1));
        put(kInputs + 1, 0);
      }
    }
  });
  constexpr int loads = (tiles * kMatrices + 3) / 4;
  const auto* const matrix = shared.halves.matrix + (candidates ? kGateMatrices : 0);
  PerLane<Halves<4>> weights[loads];
  LOPT_UNROLL for (int i = 0; i < loads; i++)
    load_matrices(weights[i], [&](int lane) { return matrix[4 * i + lane / 8][lane % 8]; });

  LOPT_UNROLL for (int p = 0; p < P; p++) {
    PerLane<Accumulator> sum[2][tiles];  // of 16 lanes' parameters, 8 columns
    LOPT_UNROLL for (int half = 0; half < 2; half++) {
      PerLane<Halves<4>> front, back;  // inputs 0 to 15; 16 to 23 twice
      load_matrices(front, [&](int lane) { return exchange.inputs[p][lane / 16][16 * half + lane % 16]; });
      load_matrices(back, [&](int lane) { return exchange.inputs[p][2][16 * half + lane % 16]; });
      LOPT_UNROLL for (int pair = 0; pair < 3; pair++)
        LOPT_UNROLL for (int tile = 0; tile < tiles; tile++)
          multiply_add(
              sum[half][tile], [&](int lane) { return pair < 2 ? front[lane] : back[lane]; },
              [&](int lane) {
                const int at = tile * kMatrices + 2 * pair;
                const uint32_t* const two = weights[at / 4][lane].pair + at % 4;
                return Halves<2>{two[0], two[1]};
              },
              [&](int lane) { return pair == 0 ? Accumulator{} : sum[half][tile][lane]; });
    }
    warp.each([&](int lane) {
      LOPT_UNROLL for (int half = 0; half < 2; half++)
        LOPT_UNROLL for (int tile = 0; tile < tiles; tile++) {
          const int row = 16 * half + lane / 4, column = 8 * tile + 2 * (lane % 4);
          if (column >= columns) continue;
          const float* const value = sum[half][tile][lane].value;
          std::memcpy(exchange.output(row, column), value, 2 * sizeof *value);
          std::memcpy(exchange.output(row + 8, column), value + 2, 2 * sizeof *value);
        }
    });
    warp.each([&](int lane) {
      LOPT_UNROLL for (int j = 0; j < columns; j++) step[lane].power[first + j].part[p] = *exchange.output(lane, j);
    });
  }
}

// Parameters of `range`, P to a thread, with products on tensor cores, as many as fill warps. Returns the rest.
template <class V, class I, int P, int threads>
LOPT_HD Range advance_warps(const Warp& warp, AdvanceShared<true>& shared, const Tensor& tensor, const Range& range,
                            PerLane<Sums>& sums) {
  using S = Step<Pack<float, P>, V, I>;
  const int64_t end = range.end - (range.end - range.begin) % (P * kLanes);
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (int64_t at = range.begin + P * kLanes * warp.index; at < end; at += P * threads) {
    PerLane<I> io([&](int lane) { return I(tensor, at + P * lane, sums[lane].value); });
    PerLane<S> step([&](int lane) { return S(shared.weights, shared.injected, io[lane]); });
    warp.each([&](int lane) { step[lane].features(); });
    multiply<false, P>(warp, shared, step);
    warp.each([&](int lane) { step[lane].gates(); });
    multiply<true, P>(warp, shared, step);
    warp.each([&](int lane) { step[lane].state(); });
  }
  return {end, range.end};
}

// Column `j` of the sums table from the sums in the order of `Io`: hidden | features | direction^2 | log lr (| attention
// direction^2) (| gradient^2), the log mean squares relative to their mean instead of to the last one's.
LOPT_HD float column_of(const float* sums, int j, bool products, bool attention) {
  const int log_ms = kHidden + kScaled + kTimescales + (products ? kTimescales - 1 : 0);
  if (j < kHidden + kTimescales) return sums[j];
  if (j < log_ms) return sums[kHidden + kProducts + j - kHidden - kTimescales];
  if (j < log_ms + kTimescales) {
    const float* relative = sums + kHidden + kLogMs;
    float mean = 0;
    LOPT_UNROLL for (int s = 0; s + 1 < kTimescales; s++) mean += relative[s] / kTimescales;
    return (j + 1 < log_ms + kTimescales ? relative[j - log_ms] : 0.f) - mean;
  }
  const int behind = j - log_ms - kTimescales - 1;
  return behind < 0 ? sums[kHidden + kRelativeLogLr] : sums[kHidden + kFeatures + behind + (behind == 2 && !attention)];
}

// A structure of 4-byte words, by `threads` threads.
template <class T>
LOPT_HD void copy_words(T* to, const void* from, int thread, int threads) {
  for (int at = 4 * thread; at < int(sizeof(T)); at += 4 * threads)
    std::memcpy(__builtin_assume_aligned(reinterpret_cast<char*>(to) + at, 4),
                __builtin_assume_aligned(static_cast<const char*>(from) + at, 4), 4);
}

template <class V, bool compact, class B>
LOPT_HD void advance(const B& block, const gpu::Advance& args, AdvanceShared<compact>& shared) {
  if (*args.skip != 0) return;
  const int chunk = args.chunk_count - 1 - block.index, index = args.chunks[chunk];
  const Row row{args.table, args.tensors, index};
  const int64_t offset = row.number(AdvanceColumn::OFFSET);
  const Tensor tensor{row.address<const void>(AdvanceColumn::GRAD), Dtype(row.number(AdvanceColumn::GRAD_DTYPE)),
                      gradient_factor(args, row), args.hidden_limit, row.address<void>(AdvanceColumn::HIDDEN),
                      row.address<void>(AdvanceColumn::ACCUM), row.address<void>(AdvanceColumn::MS),
                      row.address<float>(AdvanceColumn::LOG_LR), args.update + offset, args.attention_update + offset,
                      row.number(AdvanceColumn::SIZE)};
  const Range range = chunk_range<AdvanceColumn>(row, chunk);
  using Several = std::conditional_t<compact, CompactIo<kPack>, Io<kPack>>;
  using One = std::conditional_t<compact, CompactIo<1>, Io<1>>;
  const bool vector = tensor.n % kPack == 0 && aligned(tensor.hidden, Several::bytes) && aligned(tensor.accum, Several::bytes) &&
                      aligned(tensor.ms, Several::bytes) && aligned(tensor.log_lr, kAligned);
  block.each([&](int thread) {
    if constexpr (compact) shared.halves.fit = true;  // so far; all write the same
    copy_words(&shared.weights, args.weights, thread, B::threads);
    copy_words(&shared.injected, reinterpret_cast<const Injected<float>*>(args.injected) + index, thread, B::threads);
  });
  if constexpr (compact) block.each([&](int thread) { split_weights(shared, args.hidden_limit, thread, B::threads); });
  block.each_warp([&](const Warp& warp) {
    PerLane<Sums> sums{};
    Range rest = range;
    if constexpr (compact)
      if (vector && shared.halves.fit) rest = advance_warps<V, Several, kPack, B::threads>(warp, shared, tensor, range, sums);
    warp.each([&](int lane) {
      const int thread = kLanes * warp.index + lane;
      if (!compact && vector)
        advance_each<V, Several, kPack, B::threads>(shared, tensor, range, thread, sums[lane]);
      else
        advance_each<V, One, 1, B::threads>(shared, tensor, rest, thread, sums[lane]);
      LOPT_UNROLL for (int i = 0; i < kSums; i++) shared.warps[warp.index].sums[i][lane] = sums[lane].value[i];
    });
  });
  block.each([&](int thread) {
    constexpr int warps = B::threads / kLanes;
    const int i = thread / warps, warp = thread % warps;
    if (i >= kSums) return;
    float sum = 0;
    LOPT_UNROLL for (int k = 0; k < kLanes; k++) sum += shared.warps[warp].sums[i][(k + thread) % kLanes];  // by banks
    shared.parts[i][warp] = sum;
  });
  const int columns = kHidden + kFeatures + 3 + V::attention + args.damped - (args.products ? 0 : kTimescales - 1);
  block.each([&](int thread) {
    if (thread >= kSums) return;
    const float* part = shared.parts[thread];
    shared.totals[thread] = (part[0] + part[1]) + (part[2] + part[3]);
  });
  block.each([&](int thread) {
    if (thread >= gpu::kPartials) return;
    args.partials[int64_t(chunk) * gpu::kPartials + thread] =
        thread < columns ? column_of(shared.totals, thread, args.products, V::attention) : 0;
  });
  const int64_t count = row.number(AdvanceColumn::CHUNK_COUNT);
  if (!last_to_finish(block, args.tickets + index, count, shared.last)) return;
  const float* partials = args.partials + row.number(AdvanceColumn::CHUNK_FIRST) * gpu::kPartials;
  block.each([&](int thread) {
    const int lane = thread / 8, quad = thread % 8 * 4;
    double sum[4] = {};
#ifdef __CUDA_ARCH__
#pragma unroll 4
#endif
    for (int64_t i = lane; i < count; i += B::threads / 8)
      LOPT_UNROLL for (int k = 0; k < 4; k++) sum[k] += load_fresh(partials + i * gpu::kPartials + quad + k);
    LOPT_UNROLL for (int k = 0; k < 4; k++) shared.rows[lane][quad + k] = sum[k];
  });
  block.each([&](int thread) {
    if (thread >= columns) return;
    double sum = 0;
    for (int lane = 0; lane < B::threads / 8; lane++) sum += shared.rows[lane][thread];
    args.sums[int64_t(index) * columns + thread] = sum;
  });
}

// ---------------------------------------------------------------- summarise

// Of the table: a number, or one in device memory.
template <class Column>
LOPT_HD float learning_rate(const Row& row) {
  const int64_t dtype = row.number(Column::LR_DTYPE);
  return dtype < 0 ? float(row.real(Column::LR)) : load_any(Dtype(dtype), row.address<const void>(Column::LR), 0);
}

struct SummaryShared {
  float x[gpu::kLargestLevel], h[gpu::kLargestLevel], gates[2 * gpu::kLargestLevel];
  float squares[kSamples];
  bool last;
};

// One row through a GRU: shared.h [size] from shared.x [inputs]. `weights`: gates, bias, candidate, bias and, if `above` > 0,
// injection and bias, as in `MetaParams.flat`; `from_above` [above] is what is injected.
template <class B>
LOPT_HD void advance_gru(const B& block, SummaryShared& shared, const float* weights, const float* from_above, int inputs, int size,
                         int above) {
  const int rows = inputs + size;
  const float *gates_bias = weights + rows * 2 * size, *candidate = gates_bias + 2 * size;
  const float *candidate_bias = candidate + rows * size, *injection = candidate_bias + size;
  const float* injection_bias = injection + above * 3 * size;
  const auto start = [&](const float* bias, int j, int injected) {
    return above ? add_column(bias[j] + injection_bias[injected], from_above, injection, above, 3 * size, injected) : bias[j];
  };
  block.each([&](int thread) {
    for (int j = thread; j < 2 * size; j += B::threads) {
      const float sum = add_column(start(gates_bias, j, j), shared.x, weights, inputs, 2 * size, j);
      shared.gates[j] = 1 / (1 + expf(-add_column(sum, shared.h, weights + inputs * 2 * size, size, 2 * size, j)));
    }
  });
  block.each([&](int thread) {
    for (int j = thread; j < size; j += B::threads) shared.gates[j] *= shared.h[j];  // reset gate * state
  });
  block.each([&](int thread) {
    for (int j = thread; j < size; j += B::threads) {
      const float sum = add_column(start(candidate_bias, j, 2 * size + j), shared.x, candidate, inputs, size, j);
      const float tanh = tanhf(add_column(sum, shared.gates, candidate + inputs * size, size, size, j));
      shared.h[j] = shared.gates[size + j] * (shared.h[j] - tanh) + tanh;
    }
  });
}

template <class B>
LOPT_HD void summarise(const B& block, const gpu::Summarise& args, SummaryShared& shared) {
  if (*args.skip != 0) return;
  const Row row{args.table, args.tensors, block.index};
  const float numel = row.number(SummaryColumn::NUMEL), taken = share_taken(learning_rate<SummaryColumn>(row));
  const float* sums = args.sums + int64_t(block.index) * args.columns;
  const int size = args.tensor_size, above = args.global_size;
  float* const q = row.address<float>(SummaryColumn::TENSOR_HIDDEN);
  block.each([&](int thread) {
    if (thread == 0) {
      float factor = 1;
      if (args.damping > 0)
        factor = damp(row.address<float>(SummaryColumn::DAMPING), sums[args.columns - 1] / numel, args.damping,
                      args.damping_decay, args.gradient_limit, taken);
      for (int i = 0; i <= args.attention; i++) {
        const float mean = sums[args.squares + 2 * i] / numel;
        args.scale[int64_t(block.index) * (1 + args.attention) + i] = factor / sqrtf(mean + args.direction_eps);
      }
    }
    if (thread == 32) {
      *row.address<float>(SummaryColumn::LOG_LR_MEAN) = sums[args.squares + 1] / numel;
      *row.address<float>(SummaryColumn::STEP) += 1;
    }
    if (!size) return;
    for (int i = thread; i < args.inputs; i += B::threads) shared.x[i] = sums[i] / numel;
    for (int j = thread; j < size; j += B::threads) shared.h[j] = q[j];
  });
  if (args.places) {
    float* const distance = row.address<float>(SummaryColumn::DISTANCE);
    const float scale = args.scale[int64_t(block.index) * (1 + args.attention)];
    const int64_t* const places = args.places + int64_t(block.index) * kSamples;
    block.each([&](int thread) {
      if (thread < kSamples) shared.squares[thread] = travel(distance, thread, taken * scale * args.update[places[thread]]);
    });
    block.each([&](int thread) {
      if (thread != 0) return;
      float squares = 0;
      for (int s = 0; s < kSamples; s++) squares += shared.squares[s];
      arrive(distance, squares);
    });
  }
  if (!size) return;
  advance_gru(block, shared, args.tensor_weights, args.global_hidden, args.inputs, size, above);
  block.each([&](int thread) {
    for (int j = thread; j < size; j += B::threads) q[j] = args.states[int64_t(block.index) * size + j] = shared.h[j];
  });
  if (!above || !last_to_finish(block, args.ticket, args.tensors, shared.last)) return;

  // The mean over the tensors: several threads per unit, each of which adds every so many tensors.
  const int begin = args.global_last ? args.tensors - 1 : 0, lanes = size < B::threads ? B::threads / size : 1;
  block.each([&](int thread) {
    for (int k = thread; k < lanes * size; k += B::threads) {
      float sum = 0;
#ifdef __CUDA_ARCH__
#pragma unroll 4
#endif
      for (int i = begin + k / size; i < args.tensors; i += lanes) sum += load_fresh(args.states + int64_t(i) * size + k % size);
      shared.gates[k] = sum;
    }
  });
  block.each([&](int thread) {
    for (int j = thread; j < size; j += B::threads) {
      float sum = 0;
      for (int lane = 0; lane < lanes; lane++) sum += shared.gates[lane * size + j];
      shared.x[j] = sum / (args.tensors - begin);
    }
    for (int j = thread; j < above; j += B::threads) shared.h[j] = args.global_hidden[j];
  });
  advance_gru(block, shared, args.global_weights, nullptr, size, above, 0);
  block.each([&](int thread) {
    for (int j = thread; j < above; j += B::threads) args.global_hidden[j] = shared.h[j];
  });
}

// ---------------------------------------------------------------- apply

// p - min(1, lr * weight_decay * mean learned rate) * p - lr * scale * update. With attention that is done to true_param, and
// the parameter becomes the point at which to take the next gradient.
template <bool attention, class B>
LOPT_HD void apply(const B& block, const gpu::Apply& args) {
  if (*args.skip != 0) return;
  const int chunk = block.index, index = args.chunks[chunk];
  const Row row{args.table, args.tensors, index};
  const Range range = chunk_range<ApplyColumn>(row, chunk);
  void* const param = row.address<void>(ApplyColumn::PARAM);
  const Dtype dtype = Dtype(row.number(ApplyColumn::PARAM_DTYPE));
  const float lr = learning_rate<ApplyColumn>(row);
  const float weight_decay = row.real(ApplyColumn::WEIGHT_DECAY);
  const float learned = weight_decay > 0 ? expf(*row.address<const float>(ApplyColumn::LOG_LR_MEAN)) : 0.f;
  const float decay = fminf(lr * weight_decay * learned, 1.f);
  const float* const scale = args.scale + int64_t(index) * (1 + attention);
  const float step = lr * scale[0], attention_step = lr * scale[attention];
  const float* const update = args.update + row.number(ApplyColumn::OFFSET);
  const float* const attention_update = attention ? args.attention_update + row.number(ApplyColumn::OFFSET) : nullptr;
  float* const true_param = attention ? row.address<float>(ApplyColumn::TRUE_PARAM) : nullptr;

  const auto kept = [&](auto old) { return decay > 0 ? old - old * decay : old; };  // infinite parameters stay so
  const auto move = [&](auto number, int64_t at) {
    constexpr int P = decltype(number)::parts;
    // Loads come before the arithmetic, so that none waits for another; float64 is rare.
    if constexpr (attention) {
      const auto length = load_pack<P>(Dtype::f32, update, at), attended = load_pack<P>(Dtype::f32, attention_update, at);
      const auto rest = kept(load_pack<P>(Dtype::f32, true_param, at));
      store_pack(Dtype::f32, true_param, at, rest - length * step);
      store_pack(dtype, param, at, rest - attended * attention_step);
    } else if (dtype == Dtype::f64) {
      const auto moved = load_pack<P>(Dtype::f32, update, at) * step;
      double* const to = static_cast<double*>(param) + at;
      LOPT_UNROLL for (int p = 0; p < P; p++) {
        const double old = load_global(to + p);
        store_global(to + p, kept(old) - moved.part[p]);
      }
    } else {
      const auto length = load_pack<P>(Dtype::f32, update, at), old = load_pack<P>(dtype, param, at);
      store_pack(dtype, param, at, kept(old) - length * step);
    }
  };
  block.each([&](int thread) {
    int64_t at = range.begin + 4 * thread;
    for (; at + 4 <= range.end; at += 4 * B::threads) move(Pack<float, 4>(), at);
    for (; at < range.end; at++) move(Pack<float, 1>(), at);  // of one thread
  });
}

}  // namespace lopt::LOPT_ISA
