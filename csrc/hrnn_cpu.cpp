// The three stages of a step on the CPU. This file is compiled once per instruction set, in the namespace of its name.
//
// Computes: see hrnn.h; the arithmetic of one parameter is in hrnn_step.h.
// Cut: every tensor into chunks of kChunk parameters, the chunks of all tensors into one list over which OpenMP runs. Within
//   a chunk, blocks of kLanes vectors go through the step together, through scratch memory that stays in the first-level
//   cache. The cut depends on the sizes of the tensors alone and chunks are summed in their order, so the result does not
//   depend on the number of threads. A model of fewer than kSerial parameters is not worth waking a thread for.
// Memory: `advance` reads 80 and writes 80 bytes per parameter, after a pass over the gradients that looks for a non-finite
//   one (4 bytes); `apply` moves 12. What binds is arithmetic: see bench/README.md.
// Reference: lopt/backends/reference.py. Tests: tests/backends/test_cpu.py. Benchmark: lopt bench step.

#include <algorithm>
#include <cstring>
#include <string_view>

#include "hrnn.h"
#include "hrnn_compact.h"
#include "simd.h"

namespace lopt::LOPT_ISA {
namespace {

constexpr int64_t kChunk = 4096;
constexpr int64_t kSerial = 8192;
constexpr float kGradientLimit = 1e18f;   // GRADIENT_LIMIT in lopt/config.py; its square is a float
constexpr double kDirectionEps = 1e-16;   // DIRECTION_EPS
constexpr int kLanes = kManyRegisters ? 4 : 2;

// Input and output of the first `count` lanes of a vector, all of them if `whole`.
template <bool whole>
Vec load_lanes(const float* from, int count) {
  if constexpr (whole) return load(from);
  Vec value{};
  std::memcpy(&value, from, sizeof(float) * count);
  return value;
}

template <bool whole>
void store_lanes(float* to, Vec value, int count) {
  if constexpr (whole)
    store(to, value);
  else
    std::memcpy(to, &value, sizeof(float) * count);
}

template <bool whole>
Vec load_any(Dtype dtype, const void* from, int64_t at, int count) {
  if (dtype == Dtype::f32) return load_lanes<whole>(static_cast<const float*>(from) + at, count);
  if (whole) count = kWidth;
  if (dtype == Dtype::f64) {
    float narrow[kWidth] = {};
    for (int lane = 0; lane < count; lane++) narrow[lane] = static_cast<const double*>(from)[at + lane];
    return load(narrow);
  }
  Halves half{};
  std::memcpy(&half, static_cast<const uint16_t*>(from) + at, sizeof(uint16_t) * count);
  return dtype == Dtype::bf16 ? from_bf16(half) : from_f16(half);
}

template <bool whole>
void store_half(Dtype dtype, void* to, int64_t at, Vec value, int count) {
  const Halves half = dtype == Dtype::bf16 ? to_bf16(value) : to_f16(value);
  std::memcpy(static_cast<uint16_t*>(to) + at, &half, sizeof(uint16_t) * (whole ? kWidth : count));
}

template <bool whole>
Vec load_code(const int16_t* from, int count) {
  Shorts code{};
  std::memcpy(&code, from, sizeof(int16_t) * (whole ? kWidth : count));
  return __builtin_convertvector(__builtin_convertvector(code, Ints), Vec);
}

template <bool whole>
void store_code(int16_t* to, Vec value, int count) {
  const Shorts code = __builtin_convertvector(__builtin_convertvector(value, Ints), Shorts);
  std::memcpy(to, &code, sizeof(int16_t) * (whole ? kWidth : count));
}

// Call body(std::integral_constant<bool, whole>, i, count) for consecutive vectors of [begin, end).
template <class Body>
void for_vectors(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) body(std::true_type(), i, kWidth);
  if (i < end) body(std::false_type(), i, int(end - i));
}

struct Chunk {
  int tensor;
  int64_t begin, end;  // within the tensor
};

template <class Tensor>
std::vector<Chunk> cut(const Tensor* tensors, int count) {
  std::vector<Chunk> chunks;
  for (int tensor = 0; tensor < count; tensor++)
    for (int64_t begin = 0; begin < tensors[tensor].n; begin += kChunk)
      chunks.push_back({tensor, begin, std::min(begin + kChunk, tensors[tensor].n)});
  return chunks;
}

template <class Tensor>
std::vector<int64_t> offsets(const Tensor* tensors, int count) {
  std::vector<int64_t> offset(count + 1, 0);
  for (int tensor = 0; tensor < count; tensor++) offset[tensor + 1] = offset[tensor] + tensors[tensor].n;
  return offset;
}

// Run body(index) for every chunk, on several threads if the work is worth it.
template <class Body>
void for_chunks(const std::vector<Chunk>& chunks, int64_t total, int threads, Body body) {
  const int count = int(chunks.size());
  if (threads <= 1 || count <= 1 || total < kSerial) {
    const FlushSubnormals flush;
    for (int index = 0; index < count; index++) body(index);
    return;
  }
#pragma omp parallel num_threads(std::min(threads, count))
  {
    const FlushSubnormals flush;
#pragma omp for schedule(dynamic, 1)
    for (int index = 0; index < count; index++) body(index);
  }
}

// Vectors of partial sums over a chunk.
template <class V>
struct Sums {
  Vec hidden[kHidden] = {}, feature[kFeatures] = {}, direction{}, log_lr{}, attention{}, grad{};

  static double total(Vec lanes) {
    double sum = 0;
    for (int lane = 0; lane < kWidth; lane++) sum += lanes[lane];
    return sum;
  }

  // To the columns of the sums table: hidden | features | direction^2 | log lr (| attention direction^2) (| gradient^2).
  void finish(double* column, bool damping) const {
    for (int i = 0; i < kHidden; i++) *column++ = total(hidden[i]);
    for (int s = 0; s < kTimescales; s++) *column++ = total(feature[kScaled + s]);
    if constexpr (V::products)
      for (int s = 0; s + 1 < kTimescales; s++) *column++ = total(feature[kProducts + s]);
    double log_ms[kTimescales] = {}, mean = 0;  // from relative to the last timescale's to relative to the mean
    for (int s = 0; s + 1 < kTimescales; s++) mean += (log_ms[s] = total(feature[kLogMs + s])) / kTimescales;
    for (int s = 0; s < kTimescales; s++) *column++ = log_ms[s] - mean;
    *column++ = total(feature[kRelativeLogLr]);
    *column++ = total(direction);
    *column++ = total(log_lr);
    if constexpr (V::attention) *column++ = total(attention);
    if (damping) *column++ = total(grad);
  }
};

struct Work {
  const Weights<float>& weights;
  float hidden_limit;
  bool damping;
  const Injected<float>& injected;
  const AdvanceTensor& tensor;
  float factor;  // of the gradient
  float *update, *attention_update;
};

// Input and output of P vectors of parameters from `at` on; without `whole` of one vector of which `count` lanes exist.
template <class V, int P, bool whole>
struct Io {
  using Number = Pack<Vec, P>;
  const Work& work;
  const AdvanceTensor& t;
  int64_t at;
  int count;
  Sums<V>& sums;

  LOPT_HD Io(const Work& work, int64_t at, int count, Sums<V>& sums) : work(work), t(work.tensor), at(at), count(count), sums(sums) {}

  LOPT_HD Number read(const void* state, int feature = 0) const {
    const float* from = static_cast<const float*>(state) + feature * t.n;
    Number value;
    LOPT_UNROLL for (int p = 0; p < P; p++) value.part[p] = load_lanes<whole>(from + at + p * kWidth, count);
    return value;
  }
  LOPT_HD void write(void* state, int feature, const Number& value) const {
    float* to = static_cast<float*>(state) + feature * t.n;
    LOPT_UNROLL for (int p = 0; p < P; p++) store_lanes<whole>(to + at + p * kWidth, value.part[p], count);
  }
  LOPT_HD void add(Vec& sum, const Number& value) const {
    Vec total = value.part[0];
    LOPT_UNROLL for (int p = 1; p < P; p++) total += value.part[p];
    if constexpr (!whole)
      for (int lane = count; lane < kWidth; lane++) total[lane] = 0;
    sum += total;
  }

  LOPT_HD Number grad() const {
    Number value;
    LOPT_UNROLL for (int p = 0; p < P; p++) value.part[p] = load_any<whole>(t.dtype, t.grad, at + p * kWidth, count);
    return value * work.factor;
  }
  LOPT_HD Number log_lr() const { return read(t.log_lr); }
  LOPT_HD Number hidden(int i) const { return read(t.hidden, i); }
  LOPT_HD Number accum(int s) const { return read(t.accum, s); }
  LOPT_HD Number ms(int s) const { return read(t.ms, s); }

  LOPT_HD void put_hidden(int i, const Number& value) { write(t.hidden, i, value), add(sums.hidden[i], value); }
  LOPT_HD void put_accum(int s, const Number& value) { write(t.accum, s, value); }
  LOPT_HD void put_ms(int s, const Number& value) { write(t.ms, s, value); }
  LOPT_HD void put_feature(int i, const Number& value) { add(sums.feature[i], value); }
  LOPT_HD void put_log_lr(const Number& value) { write(t.log_lr, 0, value), add(sums.log_lr, value); }
  LOPT_HD void put_grad(const Number& value) { add(sums.grad, value * value); }
  LOPT_HD void put_update(const Number& direction, const Number& update) {
    write(work.update, 0, update), add(sums.direction, direction * direction);
  }
  LOPT_HD void put_attention(const Number& direction, const Number& update) {
    write(work.attention_update, 0, update), add(sums.attention, direction * direction);
  }
};

// The same with a compact state. Averages and mean squares come and go in pairs, the average first.
template <class V, int P, bool whole>
struct CompactIo : Io<V, P, whole> {
  using Base = Io<V, P, whole>;
  using Number = typename Base::Number;
  using C = Compact<Number>;
  using Base::Base;
  Number root_ms, accum_waiting;

  LOPT_HD Number read_code(const void* state, int feature) const {
    const int16_t* from = static_cast<const int16_t*>(state) + feature * this->t.n + this->at;
    Number value;
    LOPT_UNROLL for (int p = 0; p < P; p++) value.part[p] = load_code<whole>(from + p * kWidth, this->count);
    return value;
  }
  LOPT_HD void write_code(void* state, int feature, const Number& code) const {
    int16_t* to = static_cast<int16_t*>(state) + feature * this->t.n + this->at;
    LOPT_UNROLL for (int p = 0; p < P; p++) store_code<whole>(to + p * kWidth, code.part[p], this->count);
  }

  LOPT_HD Number hidden(int i) const { return C::hidden(read_code(this->t.hidden, i), this->work.hidden_limit); }
  LOPT_HD Number ms(int) const { return root_ms * root_ms; }  // one power of two less
  LOPT_HD Number accum(int s) {
    Number ratio;
    LOPT_UNROLL for (int p = 0; p < P; p++)
      ratio.part[p] = load_any<whole>(Dtype::f16, this->t.accum, s * this->t.n + this->at + p * kWidth, this->count);
    root_ms = C::root_ms(read_code(this->t.ms, s));
    return ratio * root_ms;
  }

  LOPT_HD void put_hidden(int i, const Number& value) {
    write_code(this->t.hidden, i, C::hidden_code(value, this->work.hidden_limit));
    this->add(this->sums.hidden[i], value);
  }
  LOPT_HD void put_accum(int, const Number& value) { accum_waiting = value; }
  LOPT_HD void put_ms(int s, const Number& value) {
    const Number code = C::ms_code(value), ratio = C::ratio(accum_waiting, code);
    write_code(this->t.ms, s, code);
    LOPT_UNROLL for (int p = 0; p < P; p++)
      store_half<whole>(Dtype::f16, this->t.accum, s * this->t.n + this->at + p * kWidth, ratio.part[p], this->count);
  }
};

template <class V, bool compact, int P, bool whole>
void advance_block(const Work& work, int64_t at, int count, Sums<V>& sums) {
  using Block = std::conditional_t<compact, CompactIo<V, P, whole>, Io<V, P, whole>>;
  Block io(work, at, count, sums);
  Step<Pack<Vec, P>, V, Block>(work.weights, work.injected, io).advance();
}

template <class V, bool compact>
void advance_chunk(const Work& work, int64_t begin, int64_t end, double* columns) {
  Sums<V> sums;
  int64_t i = begin;
  for (; i + kLanes * kWidth <= end; i += kLanes * kWidth) advance_block<V, compact, kLanes, true>(work, i, 0, sums);
  for (; i + kWidth <= end; i += kWidth) advance_block<V, compact, 1, true>(work, i, kWidth, sums);
  if (i < end) advance_block<V, compact, 1, false>(work, i, int(end - i), sums);
  sums.finish(columns, work.damping);
}

using AdvanceChunk = void (*)(const Work&, int64_t, int64_t, double*);

template <bool compact>
AdvanceChunk choose(const Config& c) {
  static constexpr AdvanceChunk table[2][2] = {
      {advance_chunk<Variant<0, 0>, compact>, advance_chunk<Variant<0, 1>, compact>},
      {advance_chunk<Variant<1, 0>, compact>, advance_chunk<Variant<1, 1>, compact>}};
  return table[c.attention][c.products];
}

bool within_limit(const AdvanceTensor& tensor, float factor, int64_t begin, int64_t end) {
  Ints within = splat(-1);
  for_vectors(begin, end, [&](auto whole, int64_t i, int count) {
    const Vec grad = load_any<whole>(tensor.dtype, tensor.grad, i, count) * factor;
    within &= absolute(grad) <= kGradientLimit;  // false for NaN
  });
  bool all = true;
  for (int lane = 0; lane < kWidth; lane++) all &= within[lane] != 0;
  return all;
}

// out += x @ weight, weight [inputs][outputs]
void add_product(const float* x, const float* weight, int inputs, int outputs, float* out) {
  for (int i = 0; i < inputs; i++)
    for (int j = 0; j < outputs; j++) out[j] += x[i] * weight[i * outputs + j];
}

// Whether a timescale's mean squares have a past anywhere in a tensor: as a rule the first value tells.
bool has_past(const AdvanceTensor& tensor, int s, bool compact) {
  const auto any = [&](const auto* ms, auto zero) {
    return std::any_of(ms + s * tensor.n, ms + (s + 1) * tensor.n, [=](auto value) { return value != zero; });
  };
  return compact ? any(static_cast<const int16_t*>(tensor.ms), kMsZero) : any(static_cast<const float*>(tensor.ms), 0.f);
}

Injected<float> inject(const Meta& meta, bool compact, const AdvanceTensor& tensor, const float* from_global, float problem_mean) {
  static_assert(sizeof(Injected<float>::bias) == sizeof(float) * Meta::kOutputs);
  Injected<float> injected;
  float* bias = injected.bias[0];
  std::copy_n(from_global, Meta::kOutputs, bias);
  add_product(tensor.tensor_hidden, meta.from_tensor.data(), meta.config.tensor_size, Meta::kOutputs, bias);
  injected.relative_to = meta.config.relative_to_problem ? problem_mean : *tensor.log_lr_mean;
  injected.rising_momentum = rising_momentum(meta.weights.momentum, tensor.damping ? tensor.damping[kFactor] : 1);
  injected.lowest = lowest_log_lr(meta.weights, *tensor.step, tensor.distance);
  injected.highest = highest_log_lr(meta.weights, injected.lowest, *tensor.log_lr_mean);
  injected.started = has_started(*tensor.step, tensor.damping);
  injected.keeps_all = true;
  for (int s = 0; s < kTimescales; s++) {
    const bool keeps = has_past(tensor, s, compact);
    injected.keep_ms[s] = keeps;
    injected.keeps_all &= keeps || !injected.started;
  }
  return injected;
}

void advance(const Advance& args) {
  if (*args.skip != 0) return;
  const Meta& meta = *args.meta;
  const int columns = meta.config.columns();
  const auto chunks = cut(args.tensors, args.count);
  const auto offset = offsets(args.tensors, args.count);
  const float unscale = args.grad_scale ? 1 / *args.grad_scale : 1;
  const auto factor = [&](const Chunk& chunk) { return unscale * args.tensors[chunk.tensor].sign; };

  std::vector<char> good(chunks.size());
  for_chunks(chunks, offset.back(), args.threads, [&](int index) {
    const Chunk& chunk = chunks[index];
    good[index] = within_limit(args.tensors[chunk.tensor], factor(chunk), chunk.begin, chunk.end);
  });
  if (!std::all_of(good.begin(), good.end(), [](char value) { return value; })) {
    *args.skip = std::max(*args.skip, 1.f);
    return;
  }

  double weighted = 0, numel = 0;
  for (int i = 0; i < args.count; i++) {
    numel += args.tensors[i].numel;
    weighted += double(args.tensors[i].numel) * *args.tensors[i].log_lr_mean;
  }
  float from_global[Meta::kOutputs];
  std::copy_n(meta.bias, Meta::kOutputs, from_global);
  add_product(args.global_hidden, meta.from_global.data(), meta.config.global_size, Meta::kOutputs, from_global);
  std::vector<Injected<float>> injected(args.count);
  for (int i = 0; i < args.count; i++) injected[i] = inject(meta, args.compact, args.tensors[i], from_global, weighted / numel);

  const AdvanceChunk advance_chunk = args.compact ? choose<true>(meta.config) : choose<false>(meta.config);
  std::vector<double> partial(chunks.size() * columns);
  for_chunks(chunks, offset.back(), args.threads, [&](int index) {
    const Chunk& chunk = chunks[index];
    const int i = chunk.tensor;
    const Work work{meta.weights, meta.hidden_limit, meta.config.damping > 0, injected[i], args.tensors[i], factor(chunk),
                    args.update + offset[i], args.attention_update + (meta.config.attention ? offset[i] : 0)};
    advance_chunk(work, chunk.begin, chunk.end, &partial[index * columns]);
  });

  std::vector<double> sums(args.count * columns, 0.);
  for (size_t index = 0; index < chunks.size(); index++)
    for (int column = 0; column < columns; column++)
      sums[chunks[index].tensor * columns + column] += partial[index * columns + column];
  std::copy(sums.begin(), sums.end(), args.sums);
}

template <class Function>
Vec apply_to(Function function, Vec x) {
  Pack<Vec, 1> number;
  number.part[0] = x;
  return function(number).part[0];
}

Vec exp2(Vec x) { return apply_to(Math<Pack<Vec, 1>>::exp2, x); }

// values[i] = sigmoid(values[i]), or its tanh; `values` is padded to a whole number of vectors.
void sigmoid(float* values, int count) {
  for (int i = 0; i < count; i += kWidth) store(values + i, 1 / (exp2(load(values + i) * -1.44269504f) + 1));
}

void tanh(float* values, int count) {
  for (int i = 0; i < count; i += kWidth) store(values + i, 2 / (exp2(load(values + i) * -2.88539008f) + 1) - 1);
}

// One row through a GRU of a higher level. x: [inputs]; injected: [3 * size] or null; h: [size], updated.
void advance_gru(const Gru& gru, const float* x, const float* injected, float* h, std::vector<float>& scratch) {
  const int size = gru.size, padded = 2 * size + kWidth;
  scratch.resize(3 * padded);
  float *gates = scratch.data(), *candidate = gates + padded, *reset_h = candidate + padded;
  const auto start = [&](float* to, const std::vector<float>& bias, const float* add) {
    for (size_t i = 0; i < bias.size(); i++) to[i] = bias[i] + (injected ? add[i] : 0);
  };
  start(gates, gru.gates_bias, injected);
  add_product(x, gru.gates.data(), gru.inputs, 2 * size, gates);
  add_product(h, &gru.gates[gru.inputs * 2 * size], size, 2 * size, gates);
  sigmoid(gates, 2 * size);
  const float *reset = gates, *update = gates + size;
  for (int i = 0; i < size; i++) reset_h[i] = reset[i] * h[i];
  start(candidate, gru.candidate_bias, injected + 2 * size);
  add_product(x, gru.candidate.data(), gru.inputs, size, candidate);
  add_product(reset_h, &gru.candidate[gru.inputs * size], size, size, candidate);
  tanh(candidate, size);
  for (int i = 0; i < size; i++) h[i] = update[i] * h[i] + (1 - update[i]) * candidate[i];
}

void summarise(const Summarise& args) {
  if (*args.skip != 0) return;
  const Meta& meta = *args.meta;
  const Config& config = meta.config;
  const int columns = config.columns(), inputs = kHidden + config.features();
  std::vector<float> means(columns), injected(meta.tensor.injection_bias), scratch, global_input(config.tensor_size, 0.f);
  add_product(args.global_hidden, meta.tensor.injection.data(), injected.empty() ? 0 : config.global_size,
              3 * config.tensor_size, injected.data());
  for (int i = 0; i < args.count; i++) {
    const SummariseTensor& tensor = args.tensors[i];
    for (int column = 0; column < columns; column++) means[column] = args.sums[i * columns + column] / tensor.numel;
    if (config.tensor_size) {
      advance_gru(meta.tensor, means.data(), injected.empty() ? nullptr : injected.data(), tensor.tensor_hidden, scratch);
      const bool last = config.global_last;
      for (int j = 0; j < config.tensor_size; j++)
        global_input[j] = last ? tensor.tensor_hidden[j] : global_input[j] + tensor.tensor_hidden[j] / args.count;
    }
    *tensor.log_lr_mean = means[inputs + 1];
    *tensor.step += 1;
    const float taken = share_taken(tensor.lr);
    float factor = 1;
    if (tensor.damping)
      factor = damp(tensor.damping, means[columns - 1], config.damping, config.damping_decay, kGradientLimit, taken);
    const float scale = args.scale[i * config.directions()] = factor / std::sqrt(means[inputs] + kDirectionEps);
    if (config.attention) args.scale[i * 2 + 1] = factor / std::sqrt(means[inputs + 2] + kDirectionEps);
    if (tensor.distance) {
      const int64_t* const places = args.places + i * kSamples;
      float squares = 0;
      for (int s = 0; s < kSamples; s++) squares += travel(tensor.distance, s, taken * scale * args.update[places[s]]);
      arrive(tensor.distance, squares);
    }
  }
  if (config.global_size) advance_gru(meta.global, global_input.data(), nullptr, args.global_hidden, scratch);
}

struct Move {
  float decay, step, attention_step;  // param - decay * param - step * update
};

void apply_chunk(const ApplyTensor& tensor, const Move& move, const float* update, const float* attention_update,
                 int64_t begin, int64_t end) {
  void* base = attention_update ? tensor.true_param : tensor.param;
  const Dtype dtype = attention_update ? Dtype::f32 : tensor.dtype;
  const bool decays = move.decay != 0;  // otherwise infinite parameters stay so
  if (dtype == Dtype::f64) {
    double* param = static_cast<double*>(base);
    for (int64_t i = begin; i < end; i++) param[i] = (decays ? param[i] - param[i] * move.decay : param[i]) - move.step * update[i];
    return;
  }
  for_vectors(begin, end, [&](auto whole, int64_t i, int count) {
    const Vec old = load_any<whole>(dtype, base, i, count), kept = decays ? old - old * move.decay : old;
    const Vec moved = kept - load_lanes<whole>(update + i, count) * move.step;
    if (dtype == Dtype::f32)
      store_lanes<whole>(static_cast<float*>(base) + i, moved, count);
    else
      store_half<whole>(dtype, base, i, moved, count);
    if (!attention_update) return;
    const Vec attended = kept - load_lanes<whole>(attention_update + i, count) * move.attention_step;
    if (tensor.dtype == Dtype::f32)
      store_lanes<whole>(static_cast<float*>(tensor.param) + i, attended, count);
    else if (tensor.dtype == Dtype::f64)
      for (int lane = 0; lane < count; lane++) static_cast<double*>(tensor.param)[i + lane] = attended[lane];
    else
      store_half<whole>(tensor.dtype, tensor.param, i, attended, count);
  });
}

void apply(const Apply& args) {
  if (*args.skip != 0) return;
  const auto chunks = cut(args.tensors, args.count);
  const auto offset = offsets(args.tensors, args.count);
  const int directions = args.attention_update ? 2 : 1;
  for_chunks(chunks, offset.back(), args.threads, [&](int index) {
    const Chunk& chunk = chunks[index];
    const ApplyTensor& tensor = args.tensors[chunk.tensor];
    if (tensor.lr == 0 && directions == 1) return;  // to the bit
    const float* scale = args.scale + chunk.tensor * directions;
    const float decay = tensor.weight_decay ? tensor.lr * tensor.weight_decay * std::exp(*tensor.log_lr_mean) : 0;
    const Move move{std::min(decay, 1.f), tensor.lr * scale[0], tensor.lr * scale[directions - 1]};
    const float* attention = directions == 2 ? args.attention_update + offset[chunk.tensor] : nullptr;
    apply_chunk(tensor, move, args.update + offset[chunk.tensor], attention, chunk.begin, chunk.end);
  });
}

bool map(const char* name, const float* from, float* to, int64_t n) {
  struct Entry {
    std::string_view name;
    Vec (*function)(Vec);
  };
  static constexpr Entry table[] = {
      {"exp2", [](Vec x) { return apply_to(Math<Pack<Vec, 1>>::exp2, x); }},
      {"log", [](Vec x) { return apply_to(Math<Pack<Vec, 1>>::log, x); }},
      {"reciprocal", [](Vec x) { return apply_to([](auto x) { return Math<Pack<Vec, 1>>::ratio(1, x); }, x); }},
      {"rsqrt", [](Vec x) { return apply_to(Math<Pack<Vec, 1>>::rsqrt, x); }},
      {"asinh", [](Vec x) { return apply_to(Math<Pack<Vec, 1>>::asinh, x); }},
      {"bf16", [](Vec x) { return from_bf16(to_bf16(x)); }},
      {"f16", [](Vec x) { return from_f16(to_f16(x)); }},
  };
  for (const Entry& entry : table) {
    if (entry.name != name) continue;
    for_vectors(0, n, [&](auto whole, int64_t i, int count) {
      store_lanes<whole>(to + i, entry.function(load_lanes<whole>(from + i, count)), count);
    });
    return true;
  }
  return false;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {advance, summarise, apply, map};

}  // namespace lopt::LOPT_ISA
