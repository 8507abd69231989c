// The parameter level of many models in lock-step and its derivative. Compiled once per instruction set.
//
// Computes: see hrnn_meta.h; the arithmetic of one parameter is in hrnn_adjoint.h.
// Cut: each row into groups of as many parameters as a number has lanes, whichever tensors they belong to, so that tensors of
//   a few parameters fill the lanes too; consecutive groups of all rows into items of kItem parameters, over which OpenMP
//   runs. Items are summed in their order: the result does not depend on the number of threads.
// Memory: 19 places of old state and 18 of new are more streams than a CPU foresees, so each group asks for the lines of the
//   one after next.
// Derivative: recomputes the step from the old state. The gradients by the weight matrix are sums of outer products; inputs
//   and cotangents of kSlabs groups are collected and multiplied in tiles that stay in registers.
// Reference: lopt/backends/reference.py, advance_flat. Tests: tests/kernels/test_hrnn_meta.py.

#include "hrnn_meta.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "simd.h"

namespace lopt::LOPT_ISA {
namespace {

// value, or 0 where `of` is 0
template <class Element, int P>
LOPT_HD Pack<Element, P> nonzero(const Pack<Element, P>& value, const Pack<Element, P>& of) {
  return Pack<Element, P>::map([](Element value, Element of) { return of == 0 ? Element{} : value; }, value, of);
}

}  // namespace
}  // namespace lopt::LOPT_ISA

#include "hrnn_adjoint.h"

namespace lopt::LOPT_ISA {
namespace {

constexpr int kItem = 4096;
constexpr size_t kCacheLine = 64;
constexpr int kSlabs = 16;
constexpr int kFewLanes = 6;  // so few are summed one by one

template <class Number>
struct Driver {
  using A = Adjoint<Number>;
  using Real = typename Number::Real;
  using Part = typename Number::Part;
  static constexpr int parts = Number::parts, lanes = sizeof(Number) / sizeof(Real);

  // What stands two groups behind `at`, perhaps behind the end of the array: nothing happens there.
  template <bool written>
  static LOPT_HD void prefetch(const void* array, int64_t at) {
    const char* from = static_cast<const char*>(array) + (at + 2 * lanes) * int64_t(sizeof(Real));
    for (size_t line = 0; line < sizeof(Number); line += kCacheLine) __builtin_prefetch(from + line, written);
  }

  static LOPT_HD Number read(const void* from, int64_t at, int count) {
    Number number(0);
    if (!from) return number;
    if (count == lanes)
      std::memcpy(&number, static_cast<const Real*>(from) + at, sizeof number);
    else
      std::memcpy(&number, static_cast<const Real*>(from) + at, sizeof(Real) * count);
    return number;
  }

  static LOPT_HD void write(void* to, int64_t at, const Number& value, int count) {
    if (count == lanes)
      std::memcpy(static_cast<Real*>(to) + at, &value, sizeof value);
    else
      std::memcpy(static_cast<Real*>(to) + at, &value, sizeof(Real) * count);
  }

  // `count` parameters of a row, of one tensor or of several: those of run r are the lanes begins[r] to begins[r + 1] - 1.
  struct Group {
    int64_t row, at;
    int count, runs;
    const int32_t* owner;  // [count] numbers of the tensors
    int8_t begins[lanes + 1];

    bool uniform() const { return count == lanes && runs == 1; }
    int64_t tensor(int run) const { return owner[begins[run]]; }
  };

  const MetaStep& step;
  const Options<Real> options;
  const int columns;  // of the sums
  const int64_t groups, total;
  std::vector<Real> keep;  // [R][T][4]

  explicit Driver(const MetaStep& step)
      : step(step),
        options{Real(step.products), Real(step.ms_eps), Real(step.rms_eps), step.attention},
        columns(kHidden + kInputs - (step.products ? 0 : kTimescales - 1) + 2 + step.attention),
        groups((step.n + lanes - 1) / lanes),
        total(groups * step.rows),
        keep(step.rows * step.tensors * kTimescales) {
    for (int64_t row = 0; row < step.rows; row++)
      for (int64_t tensor = 0; tensor < step.tensors; tensor++)
        for (int s = 0; s < kTimescales; s++) {
          const Real* ms = static_cast<const Real*>(step.old.ms) + (row * kTimescales + s) * step.n;
          keep[(row * step.tensors + tensor) * kTimescales + s] =
              std::any_of(ms + step.begins[tensor], ms + step.begins[tensor + 1], [](Real value) { return value != 0; });
        }
  }

  Group group(int64_t index) const {
    const int64_t row = index / groups, at = index % groups * lanes;
    const int count = int(std::min<int64_t>(lanes, step.n - at));
    Group g{row, at, count, 1, step.owner + at, {}};
    if (g.owner[0] != g.owner[count - 1])
      for (int k = 1; k < count; k++)
        if (g.owner[k] != g.owner[k - 1]) g.begins[g.runs++] = int8_t(k);
    g.begins[g.runs] = int8_t(count);
    return g;
  }

  int items() const { return int((total * lanes + kItem - 1) / kItem); }
  static constexpr int per_item = kItem / lanes;
  int64_t first(int item) const { return int64_t(item) * per_item; }
  int64_t last(int item) const { return std::min(total, first(item) + per_item); }

  // Run body(item), on several threads if the work is worth it.
  template <class Body>
  void for_items(Body body) const {
    const int count = items();
    if (step.threads <= 1 || count <= 1) {
      const FlushSubnormals flush;
      for (int item = 0; item < count; item++) body(item);
      return;
    }
#pragma omp parallel num_threads(std::min(step.threads, count))
    {
      const FlushSubnormals flush;
#pragma omp for schedule(dynamic, 1)
      for (int item = 0; item < count; item++) body(item);
    }
  }

  // Rows of a table [R][T][width] for each parameter of a group; a null table is zero.
  LOPT_HD void spread(const void* table, int width, const Group& g, Number* to) const {
    if (!table) {
      for (int i = 0; i < width; i++) to[i] = Number(0);
      return;
    }
    const Real* rows = static_cast<const Real*>(table) + g.row * step.tensors * width;
    for (int i = 0; i < width; i++) to[i] = Number(rows[g.tensor(0) * width + i]);
    for (int run = 1; run < g.runs; run++) {
      const Real* row = rows + g.tensor(run) * width;
      for (int i = 0; i < width; i++) to[i] = from_lane(g.begins[run], Number(row[i]), to[i]);
    }
  }

  // Lanes from `begin` on of `behind`, those before it of `before`.
  static LOPT_HD Number from_lane(int begin, const Number& behind, const Number& before) {
    if constexpr (lanes == 1) {
      return begin ? before : behind;
    } else {
      Number out;
      LOPT_UNROLL for (int p = 0; p < parts; p++)
        out.part[p] = select(lane_numbers() >= splat(int32_t(begin - p * lanes / parts)), behind.part[p], before.part[p]);
      return out;
    }
  }

  void share(const Group& g, Shared<Number>& shared) const {
    spread(step.injected, kGates, g, shared.bias);
    spread(step.relative_to, 1, g, &shared.relative_to);
    spread(step.lowest, 1, g, &shared.lowest);
    spread(step.highest, 1, g, &shared.highest);
    spread(keep.data(), kTimescales, g, shared.keep_ms);
  }

  void load(const Group& g, A& a, Slab<Number>& slab) const {
    load(step.old, g, slab.hidden, a.old);
    a.grad = read(step.grad, g.row * step.n + g.at, g.count);
  }

  void load(const MetaState& from, const Group& g, Number* hidden, State<Number>& to) const {
    const auto get = [&](Number& number, const void* array, int features, int f) {
      const int64_t at = (g.row * features + f) * step.n + g.at;
      if (array) prefetch<false>(array, at);
      number = read(array, at, g.count);
    };
    for (int i = 0; i < kHidden; i++) get(hidden[i], from.hidden, kHidden, i);
    for (int s = 0; s < kTimescales; s++) get(to.accum[s], from.accum, kTimescales, s), get(to.ms[s], from.ms, kTimescales, s);
    get(to.grad_decay, from.grad_decay, 1, 0);
    get(to.scale_decay, from.scale_decay, 1, 0);
    get(to.log_lr, from.log_lr, 1, 0);
  }

  void store(const MetaState& to, const Group& g, const Number* hidden, const State<Number>& from) const {
    const auto put = [&](void* array, int features, int f, const Number& value) {
      if (!array) return;
      const int64_t at = (g.row * features + f) * step.n + g.at;
      prefetch<true>(array, at);
      write(array, at, value, g.count);
    };
    for (int i = 0; i < kHidden; i++) put(to.hidden, kHidden, i, hidden[i]);
    for (int s = 0; s < kTimescales; s++) put(to.accum, kTimescales, s, from.accum[s]), put(to.ms, kTimescales, s, from.ms[s]);
    put(to.grad_decay, 1, 0, from.grad_decay);
    put(to.scale_decay, 1, 0, from.scale_decay);
    put(to.log_lr, 1, 0, from.log_lr);
  }

  const PlainWeights<Real>& weights(int64_t row) const {
    return *reinterpret_cast<const PlainWeights<Real>*>(static_cast<const Real*>(step.weights) + row * step.weight_stride);
  }

  static LOPT_HD double sum(const Number& number) {
    Part total = number.part[0];
    LOPT_UNROLL for (int p = 1; p < parts; p++) total = total + number.part[p];
    return lane_sum(total);
  }

  // Sums of `width` values over each tensor of an item.
  template <int width>
  struct PerTensor {
    const Driver& driver;
    int64_t first = 0;  // row * T + tensor
    int64_t current = -1;
    std::vector<double> sums;  // [tensors of the item][width]
    Number running[width];

    PerTensor(const Driver& driver, int item) : driver(driver) {
      const Group begin = driver.group(driver.first(item)), end = driver.group(driver.last(item) - 1);
      first = begin.row * driver.step.tensors + begin.owner[0];
      sums.assign((end.row * driver.step.tensors + end.owner[end.count - 1] - first + 1) * width, 0.);
    }

    // Before the values of a group.
    LOPT_HD void enter(const Group& g) {
      const int64_t index = g.uniform() ? g.row * driver.step.tensors - first + g.owner[0] : -1;
      if (index == current) return;
      flush();
      current = index;
      for (Number& number : running) number = Number(0);
    }

    // Add `count` of a group's values to the sums from `at` on.
    LOPT_HD void add(const Group& g, int at, const Number* values, int count) {
      if (g.uniform()) {
        for (int i = 0; i < count; i++) running[at + i] = running[at + i] + values[i];
        return;
      }
      const Real* lane = reinterpret_cast<const Real*>(values);
      for (int run = 0; run < g.runs; run++) {
        const int begin = g.begins[run], end = g.begins[run + 1];
        double* to = &sums[(g.row * driver.step.tensors - first + g.tensor(run)) * width + at];
        if (end - begin < kFewLanes)
          for (int i = 0; i < count; i++)
            for (int k = begin; k < end; k++) to[i] += lane[i * lanes + k];
        else
          for (int i = 0; i < count; i++)
            to[i] += sum(from_lane(begin, from_lane(end, Number(0), values[i]), Number(0)));
      }
    }

    void flush() {
      if (current < 0) return;
      for (int i = 0; i < width; i++) sums[current * width + i] += sum(running[i]);
      current = -1;
    }
  };

  struct Partial {
    int64_t first = 0;
    std::vector<double> per_tensor, weights;
  };

  // [R * T][width] of the items' sums
  std::vector<double> gather(const std::vector<Partial>& partials, int width) const {
    std::vector<double> all(step.rows * step.tensors * width, 0.);
    for (const Partial& partial : partials)
      for (size_t i = 0; i < partial.per_tensor.size(); i++) all[partial.first * width + i] += partial.per_tensor[i];
    return all;
  }

  static constexpr int kSummands = sizeof(Summands<Number>) / sizeof(Number);
  static Number* numbers(Summands<Number>& summands) { return reinterpret_cast<Number*>(&summands); }

  // Column of the sums table of each summand, -1 for those that the configuration has not.
  void summand_columns(int (&column)[kSummands]) const {
    int next = 0;
    for (int i = 0; i < kSummands; i++) {
      const bool product = i >= kHidden + kTimescales && i < kHidden + 2 * kTimescales - 1;
      const bool absent = (product && !step.products) || (i == kSummands - 1 && !step.attention);
      column[i] = absent ? -1 : next++;
    }
  }

  void forward(const MetaForward& args) const {
    int column[kSummands];
    summand_columns(column);
    std::vector<Partial> partials(items());
    for_items([&](int item) {
      PerTensor<kSummands> sums(*this, item);
      A a;
      Slab<Number> slab;
      Shared<Number> shared;
      for (int64_t index = first(item); index < last(item); index++) {
        const Group g = group(index);
        const PlainWeights<Real>& w = weights(g.row);
        share(g, shared);
        load(g, a, slab);
        a.step_factor = Number(std::exp(w.offset));
        a.forward(w, options, shared, slab);
        store(args.now, g, a.new_hidden, a.now);
        const int64_t at = g.row * step.n + g.at;
        write(args.update, at, a.update, g.count);
        if (step.attention) write(args.attention_update, at, a.attention_update, g.count);
        const Number others[] = {a.direction * a.direction, a.now.log_lr, a.attention * a.attention};
        sums.enter(g);
        sums.add(g, 0, a.new_hidden, kHidden);
        sums.add(g, kHidden, slab.input, kInputs);
        sums.add(g, kHidden + kInputs, others, 3);
      }
      sums.flush();
      partials[item] = {sums.first, std::move(sums.sums), {}};
    });
    const auto all = gather(partials, kSummands);
    for (int64_t i = 0; i < step.rows * step.tensors; i++)
      for (int c = 0; c < kSummands; c++)
        if (column[c] >= 0) static_cast<Real*>(args.sums)[i * columns + column[c]] = Real(all[i * kSummands + c]);
  }

  // to[i][j] += sum over slabs of rows[i] * dz[j], one tile.
  template <int rows, int columns>
  static LOPT_HD void tile(const Number* from_rows, const Number* from_columns, int slabs, Part* to) {
    constexpr int stride = sizeof(Slab<Number>) / sizeof(Number);
    Part sum[rows][columns];
    LOPT_UNROLL for (int i = 0; i < rows; i++)
      LOPT_UNROLL for (int j = 0; j < columns; j++) sum[i][j] = to[i * kGates + j];
    LOPT_LOOP for (int slab = 0; slab < slabs; slab++) {
      LOPT_UNROLL for (int p = 0; p < parts; p++) {
        Part column[columns];
        LOPT_UNROLL for (int j = 0; j < columns; j++) column[j] = from_columns[slab * stride + j].part[p];
        LOPT_UNROLL for (int i = 0; i < rows; i++) {
          const Part row = from_rows[slab * stride + i].part[p];
          LOPT_UNROLL for (int j = 0; j < columns; j++) sum[i][j] = sum[i][j] + row * column[j];
        }
      }
    }
    LOPT_UNROLL for (int i = 0; i < rows; i++)
      LOPT_UNROLL for (int j = 0; j < columns; j++) to[i * kGates + j] = sum[i][j];
  }

  template <int rows, int columns>
  static void tiles(const Number* from_rows, int row_count, const Number* from_columns, int column_count, int slabs, Part* to) {
    LOPT_LOOP for (int i = 0; i < row_count; i += rows)
      LOPT_LOOP for (int j = 0; j < column_count; j += columns)
        tile<rows, columns>(from_rows + i, from_columns + j, slabs, to + i * kGates + j);
  }

  static void outer_products(const Slab<Number>* slabs, int count, Part* matrix) {
    tiles<kManyRegisters ? 4 : 2, 5>(slabs->input, kInputs, slabs->dz, kGates, count, matrix);
    matrix += kInputs * kGates;
    tiles<kManyRegisters ? 5 : 2, 5>(slabs->hidden, kHidden, slabs->dz, 2 * kHidden, count, matrix);
    tiles<kManyRegisters ? 5 : 2, 5>(slabs->reset_hidden, kHidden, slabs->dz + 2 * kHidden, kHidden, count, matrix + 2 * kHidden);
  }

  void backward(const MetaBackward& args) const {
    constexpr int matrix_size = (kInputs + kHidden) * kGates, width = kGates + 1;
    int column[kSummands];
    summand_columns(column);
    std::vector<Partial> partials(items());
    // Cotangents of the sums, one for each summand.
    std::vector<Real> d_sums(args.sums ? step.rows * step.tensors * kSummands : 0, Real(0));
    if (args.sums)
      for (int64_t i = 0; i < step.rows * step.tensors; i++)
        for (int c = 0; c < kSummands; c++)
          if (column[c] >= 0) d_sums[i * kSummands + c] = static_cast<const Real*>(args.sums)[i * columns + column[c]];
    const PlainWeights<Real>& w = weights(0);
    const Number step_factor(std::exp(w.offset));
    MetaState now = args.now;
    now.grad_decay = now.scale_decay = nullptr;
    for_items([&](int item) {
      PerTensor<width> per_tensor(*this, item);
      A a;
      a.step_factor = step_factor;
      Slab<Number> slabs[kSlabs];
      Shared<Number> shared;
      Summands<Number> sums;
      State<Number> d;
      Number d_hidden[kHidden], d_relative_to;
      Part matrix[matrix_size];
      Number read_outs[kReadOuts];
      for (Part& part : matrix) part = Part{};
      for (Number& number : read_outs) number = Number(0);
      int collected = 0;
      for (int64_t index = first(item); index < last(item); index++) {
        const Group g = group(index);
        const int64_t at = g.row * step.n + g.at;
        Slab<Number>& slab = slabs[collected++];
        share(g, shared);
        load(g, a, slab);
        a.forward(w, options, shared, slab);
        load(now, g, d_hidden, d);
        spread(args.sums ? d_sums.data() : nullptr, kSummands, g, numbers(sums));
        if (g.count < lanes) clear_tail(g.count, numbers(sums));
        a.backward(w, options, shared, sums, read(args.update, at, g.count), read(args.attention_update, at, g.count), slab,
                   d_hidden, d, d_relative_to, read_outs);
        store(args.d_old, g, d_hidden, d);
        per_tensor.enter(g);
        per_tensor.add(g, 0, slab.dz, kGates);
        per_tensor.add(g, kGates, &d_relative_to, 1);
        if (collected == kSlabs) {
          outer_products(slabs, collected, matrix);
          collected = 0;
        }
      }
      if (collected) outer_products(slabs, collected, matrix);
      per_tensor.flush();
      std::vector<double> d_weights(matrix_size + kReadOuts);
      for (int i = 0; i < matrix_size; i++) d_weights[i] = lane_sum(matrix[i]);
      for (int i = 0; i < kReadOuts; i++) d_weights[matrix_size + i] = sum(read_outs[i]);
      partials[item] = {per_tensor.first, std::move(per_tensor.sums), std::move(d_weights)};
    });
    const auto all = gather(partials, width);
    for (int64_t i = 0; i < step.rows * step.tensors; i++) {
      for (int j = 0; j < kGates; j++) static_cast<Real*>(args.d_injected)[i * kGates + j] = Real(all[i * width + j]);
      static_cast<Real*>(args.d_relative_to)[i] = Real(all[i * width + kGates]);
    }
    for (int i = 0; i < matrix_size + kReadOuts; i++) {
      double sum = 0;
      for (const Partial& partial : partials) sum += partial.weights[i];
      static_cast<Real*>(args.d_weights)[i] = Real(sum);
    }
  }

  // Without cotangents the lanes behind a row's end add nothing to any gradient.
  static void clear_tail(int count, Number* numbers) {
    Real* lane = reinterpret_cast<Real*>(numbers);
    for (int i = 0; i < kSummands; i++)
      for (int k = count; k < lanes; k++) lane[i * lanes + k] = 0;
  }
};

template <class Number>
void forward(const MetaForward& args) {
  Driver<Number>(args.step).forward(args);
}

template <class Number>
void backward(const MetaBackward& args) {
  Driver<Number>(args.step).backward(args);
}

}  // namespace

extern const MetaKernels meta_kernels;
using Floats = Pack<Vec, 2>;
using Double = Pack<double, 1>;
const MetaKernels meta_kernels = {{forward<Floats>, forward<Double>}, {backward<Floats>, backward<Double>}};

}  // namespace lopt::LOPT_ISA
