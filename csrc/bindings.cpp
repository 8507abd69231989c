// The Python face of lopt._C: addresses of tensors in, nothing of torch. lopt/backends/cpu.py and
// cuda.py are the callers. It is compiled once for the baseline processor; hrnn_*.cpp is compiled once per instruction set,
// each in a namespace of that set's name. setup.py defines
//     LOPT_FOR_EACH_ISA(X)   X(v2) X(v3) X(v4) on x86-64, X(generic) elsewhere; weakest first
//     LOPT_VERSION           the package's version
//     LOPT_CUDA_ARCHS        what the .cu files are compiled for; undefined without them

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "hrnn.h"
#include "hrnn_cuda.h"
#include "hrnn_meta.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

#define LOPT_DECLARE(isa)      \
  namespace lopt::isa {        \
  extern const Kernels kernels; \
  extern const MetaKernels meta_kernels; \
  }
LOPT_FOR_EACH_ISA(LOPT_DECLARE)
#undef LOPT_DECLARE

// Whether this processor runs code compiled for `isa`.
static bool runs([[maybe_unused]] const char* isa) {
#if defined(__x86_64__)
  if (!std::strcmp(isa, "v4"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && runs("v3");
  if (!std::strcmp(isa, "v3"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
  return true;
}

static py::dict compiled() {
  py::list isas;
#define LOPT_ADD(isa) isas.append(#isa);
  LOPT_FOR_EACH_ISA(LOPT_ADD)
#undef LOPT_ADD
  py::dict result;
  result["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  result["isas"] = isas;
#ifdef _OPENMP
  result["openmp"] = true;
#else
  result["openmp"] = false;
#endif
#ifdef LOPT_CUDA_ARCHS
  result["cuda"] = LOPT_CUDA_ARCHS;
#else
  result["cuda"] = py::none();
#endif
  return result;
}

struct Active {
  std::string isa;
  const lopt::Kernels* kernels = nullptr;
  const lopt::MetaKernels* meta = nullptr;
};

// The strongest instruction set that this processor runs, or the one named `name`.
static Active strongest(const std::string& name) {
  Active active;
#define LOPT_TRY(isa) \
  if (runs(#isa) && (name.empty() || name == #isa)) active = {#isa, &lopt::isa::kernels, &lopt::isa::meta_kernels};
  LOPT_FOR_EACH_ISA(LOPT_TRY)
#undef LOPT_TRY
  if (!active.kernels) throw std::invalid_argument("instruction set '" + name + "' is not compiled in or not run by this processor");
  return active;
}

static Active& active() {
  static Active chosen = strongest("");
  return chosen;
}

// Lists of equal length with one address, number or truth value per tensor. Read without conversions: there are a dozen per
// step, and for a small model that is most of its time.
class List {
 public:
  List() = default;
  List(py::list list) : list_(list.ptr()), size_(PyList_GET_SIZE(list_)) {}
  int size() const { return int(size_); }
  int64_t number(int i) const {
    const int64_t value = PyLong_AsLongLong(at(i));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  double real(int i) const {
    const double value = PyFloat_AsDouble(at(i));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  // Null from an empty list: a kind of state that the configuration has not.
  template <class T>
  T* address(int i) const { return size_ ? reinterpret_cast<T*>(number(i)) : nullptr; }

 private:
  PyObject* at(int i) const {
    if (i >= size_) throw std::out_of_range("a list has fewer entries than there are tensors");
    return PyList_GET_ITEM(list_, i);
  }
  PyObject* list_ = nullptr;
  Py_ssize_t size_ = 0;
};

namespace pybind11::detail {
template <>
struct type_caster<List> {
  PYBIND11_TYPE_CASTER(List, const_name("list"));
  bool load(handle source, bool) {
    if (!PyList_Check(source.ptr())) return false;
    value = List(reinterpret_borrow<list>(source));
    return true;
  }
};
}  // namespace pybind11::detail

template <class T>
static T* pointer(int64_t address) { return reinterpret_cast<T*>(address); }

static lopt::Meta pack(py::dict config, py::dict addresses) {
  lopt::Config c;
  c.tensor_size = config["tensor_size"].cast<int>();
  c.global_size = config["global_size"].cast<int>();
  c.attention = config["attention"].cast<bool>();
  c.shortcut = config["shortcut"].cast<bool>();
  c.products = config["products"].cast<bool>();
  c.relative_to_problem = config["relative_to_problem"].cast<bool>();
  c.global_last = config["global_last"].cast<bool>();
  c.log_lr_min = config["log_lr_min"].cast<float>();
  c.log_lr_min_steps = config["log_lr_min_steps"].cast<float>();
  c.log_lr_min_distance = config["log_lr_min_distance"].cast<float>();
  c.log_lr_min_distance_limit = config["log_lr_min_distance_limit"].cast<float>();
  c.log_lr_max = config["log_lr_max"].cast<float>();
  c.log_lr_max_ratio = config["log_lr_max_ratio"].cast<float>();
  c.ms_eps = config["ms_eps"].cast<float>();
  c.rms_eps = config["rms_eps"].cast<float>();
  c.damping = config["damping"].cast<float>();
  c.damping_decay = config["damping_decay"].cast<float>();
  c.fixed_grad_decay = config["fixed_grad_decay"].cast<float>();
  c.fixed_scale_decay = config["fixed_scale_decay"].cast<float>();
  const auto find = [](const void* context, const char* name) -> const float* {
    const auto& addresses = *static_cast<const py::dict*>(context);
    return addresses.contains(name) ? pointer<const float>(addresses[name].cast<int64_t>()) : nullptr;
  };
  return lopt::pack(c, find, &addresses);
}

static void advance(const lopt::Meta& meta, bool compact, List grads, List dtypes, List maximize, List n, List numel, List hidden, List accum,
                    List ms, List step, List tensor_hidden, List log_lr_mean, List damping, List distance, List log_lr,
                    int64_t global_hidden, int64_t grad_scale, int64_t skip, int64_t update, int64_t attention_update, int64_t sums, int threads) {
  std::vector<lopt::AdvanceTensor> tensors(grads.size());
  for (int i = 0; i < grads.size(); i++)
    tensors[i] = {grads.address<const void>(i), lopt::Dtype(dtypes.number(i)), maximize.number(i) ? -1.f : 1.f,
                  n.number(i), numel.number(i), hidden.address<void>(i), accum.address<void>(i), ms.address<void>(i),
                  log_lr.address<float>(i), step.address<const float>(i), tensor_hidden.address<const float>(i),
                  log_lr_mean.address<const float>(i), damping.address<const float>(i), distance.address<const float>(i)};
  const lopt::Advance args{&meta, compact, tensors.data(), grads.size(), pointer<const float>(global_hidden),
                           pointer<const float>(grad_scale), pointer<float>(skip), pointer<float>(update),
                           pointer<float>(attention_update), pointer<float>(sums), threads};
  const py::gil_scoped_release release;
  active().kernels->advance(args);
}

static void summarise(const lopt::Meta& meta, List numel, List step, List tensor_hidden, List log_lr_mean, List damping,
                      List distance, List lr, int64_t global_hidden, int64_t sums, int64_t update, int64_t places, int64_t skip,
                      int64_t scale) {
  std::vector<lopt::SummariseTensor> tensors(numel.size());
  for (int i = 0; i < numel.size(); i++)
    tensors[i] = {numel.number(i), tensor_hidden.address<float>(i), log_lr_mean.address<float>(i), damping.address<float>(i),
                  distance.address<float>(i), step.address<float>(i), float(lr.real(i))};
  const lopt::Summarise args{&meta, pointer<const float>(sums), tensors.data(), numel.size(), pointer<float>(global_hidden),
                             pointer<const float>(update), pointer<const int64_t>(places), pointer<const float>(skip),
                             pointer<float>(scale)};
  const py::gil_scoped_release release;
  active().kernels->summarise(args);
}

static void apply(List params, List dtypes, List n, List log_lr_mean, List true_param, List lr, List weight_decay,
                  int64_t update, int64_t attention_update, int64_t scale, int64_t skip, int threads) {
  std::vector<lopt::ApplyTensor> tensors(params.size());
  for (int i = 0; i < params.size(); i++)
    tensors[i] = {params.address<void>(i), lopt::Dtype(dtypes.number(i)), n.number(i), true_param.address<float>(i),
                  log_lr_mean.address<const float>(i), float(lr.real(i)), float(weight_decay.real(i))};
  const lopt::Apply args{tensors.data(), params.size(), pointer<const float>(update), pointer<const float>(attention_update),
                         pointer<const float>(scale), pointer<const float>(skip), threads};
  const py::gil_scoped_release release;
  active().kernels->apply(args);
}

static void map(const std::string& function, int64_t from, int64_t to, int64_t n) {
  if (!active().kernels->map(function.c_str(), pointer<const float>(from), pointer<float>(to), n))
    throw std::invalid_argument("no function '" + function + "' to test");
}

static lopt::MetaState meta_state(List at) {
  const auto pointer = [&](int i) { return at.address<void>(i); };
  return {pointer(0), pointer(1), pointer(2), pointer(3), pointer(4), pointer(5)};
}

// What both directions of a meta-training step have in common; see lopt/backends/cpu_flat.py.
static lopt::MetaStep meta_step(py::dict common, List old) {
  const auto integer = [&](const char* name) { return common[name].cast<int64_t>(); };
  const auto real = [&](const char* name) { return common[name].cast<double>(); };
  return {integer("rows"), integer("n"), integer("tensors"), pointer<const int32_t>(integer("owner")),
          pointer<const int64_t>(integer("begins")), common["products"].cast<bool>(), common["attention"].cast<bool>(),
          real("ms_eps"), real("rms_eps"), integer("weight_stride"),
          pointer<const void>(integer("weights")), pointer<const void>(integer("injected")),
          pointer<const void>(integer("relative_to")), pointer<const void>(integer("lowest")),
          pointer<const void>(integer("highest")), pointer<const void>(integer("grad")), meta_state(old),
          int(integer("threads"))};
}

static void meta_forward(bool is_double, py::dict common, List old, List now, int64_t update, int64_t attention_update, int64_t sums) {
  const lopt::MetaForward args{meta_step(common, old), meta_state(now), pointer<void>(update), pointer<void>(attention_update),
                               pointer<void>(sums)};
  const py::gil_scoped_release release;
  active().meta->forward[is_double](args);
}

static void meta_backward(bool is_double, py::dict common, List old, List now, int64_t update, int64_t attention_update,
                          int64_t sums, List d_old, int64_t d_weights, int64_t d_injected, int64_t d_relative_to) {
  const lopt::MetaBackward args{meta_step(common, old), meta_state(now), pointer<const void>(update),
                                pointer<const void>(attention_update), pointer<const void>(sums), meta_state(d_old),
                                pointer<void>(d_weights), pointer<void>(d_injected), pointer<void>(d_relative_to)};
  const py::gil_scoped_release release;
  active().meta->backward[is_double](args);
}

// What the GPU kernels and lopt/backends/gpu.py have to agree on.
static py::dict gpu_layout() {
#define LOPT_NAME(name) #name,
  const std::vector<const char*> advance = {LOPT_ADVANCE_COLUMNS(LOPT_NAME)}, summary = {LOPT_SUMMARY_COLUMNS(LOPT_NAME)};
  const std::vector<const char*> apply = {LOPT_APPLY_COLUMNS(LOPT_NAME)};
#undef LOPT_NAME
  using W = lopt::Weights<float>;
  py::dict weights;
#define LOPT_FIELD(name) weights[#name] = offsetof(W, name) / sizeof(float);
  LOPT_FIELD(gru) LOPT_FIELD(direction) LOPT_FIELD(direction_shortcut) LOPT_FIELD(attention) LOPT_FIELD(attention_shortcut)
  LOPT_FIELD(decay) LOPT_FIELD(decay_bias) LOPT_FIELD(log_lr) LOPT_FIELD(log_lr_bias) LOPT_FIELD(momentum)
  LOPT_FIELD(log_lr_min) LOPT_FIELD(log_lr_min_steps) LOPT_FIELD(log_lr_min_distance)
  LOPT_FIELD(log_lr_min_distance_limit) LOPT_FIELD(log_lr_max) LOPT_FIELD(log_lr_max_ratio) LOPT_FIELD(log2_step_offset)
  LOPT_FIELD(attention_factor) LOPT_FIELD(ms_eps) LOPT_FIELD(rms_eps) LOPT_FIELD(moves_unseen)
#undef LOPT_FIELD
  py::dict layout;
  layout["advance"] = advance;
  layout["summary"] = summary;
  layout["apply"] = apply;
  layout["weights"] = weights;
  layout["weights_size"] = sizeof(W) / sizeof(float);
  layout["columns_at_once"] = lopt::kColumns;
  layout["injected_size"] = sizeof(lopt::Injected<float>) / sizeof(float);
  layout["partials"] = lopt::gpu::kPartials;
  layout["pack"] = lopt::gpu::kPack;
  layout["tile"] = lopt::gpu::kTile;
  layout["largest_level"] = lopt::gpu::kLargestLevel;
  layout["samples"] = lopt::kSamples;
  return layout;
}

// Named arguments of a GPU launch.
class Named {
 public:
  explicit Named(const py::dict& values) : values_(values) {}
  int64_t integer(const char* name) const { return at(name).cast<int64_t>(); }
  double real(const char* name) const { return at(name).cast<double>(); }
  template <class T>
  T* address(const char* name) const { return pointer<T>(integer(name)); }

 private:
  py::handle at(const char* name) const { return values_[name]; }
  const py::dict& values_;
};

static const lopt::gpu::Launches& launches(bool emulated) {
#ifdef LOPT_CUDA_ARCHS
  if (!emulated) return lopt::gpu::cuda;
#endif
  if (!emulated) throw std::runtime_error("lopt._C was built without CUDA kernels");
  return lopt::gpu::emulated;
}

// A launch waits where the queue of the device is full; other threads of Python go on.
template <class Args>
static void launch(const char* stage, const char* (*stage_of)(const Args&, void*), const Args& args, int64_t stream) {
  const char* error;
  {
    const py::gil_scoped_release others;
    error = stage_of(args, pointer<void>(stream));
  }
  if (error) throw std::runtime_error(std::string("launch of ") + stage + " failed: " + error);
}

static void gpu_advance(bool emulated, int64_t stream, const py::dict& values) {
  const Named named(values);
  lopt::gpu::Advance args{};
  args.table = named.address<const int64_t>("table");
  args.chunks = named.address<const int32_t>("chunks");
  args.tensors = int(named.integer("tensors"));
  args.chunk_count = int(named.integer("chunk_count"));
  args.weights = named.address<const float>("weights");
  args.bias = named.address<const float>("bias");
  args.from_tensor = named.address<const float>("from_tensor");
  args.from_global = named.address<const float>("from_global");
  args.global_hidden = named.address<const float>("global_hidden");
  args.tensor_size = int(named.integer("tensor_size"));
  args.global_size = int(named.integer("global_size"));
  args.relative_to_problem = named.integer("relative_to_problem");
  args.damped = named.integer("damped");
  args.attention = named.integer("attention");
  args.products = named.integer("products");
  args.compact = named.integer("compact");
  args.hidden_limit = float(named.real("hidden_limit"));
  args.gradient_limit = float(named.real("gradient_limit"));
  args.grad_scale = named.address<const float>("grad_scale");
  args.skip = named.address<float>("skip");
  args.injected = named.address<float>("injected");
  args.update = named.address<float>("update");
  args.attention_update = named.address<float>("attention_update");
  args.partials = named.address<float>("partials");
  args.tickets = named.address<int32_t>("tickets");
  args.sums = named.address<float>("sums");
  launch("advance", launches(emulated).advance, args, stream);
}

static void gpu_summarise(bool emulated, int64_t stream, const py::dict& values) {
  const Named named(values);
  lopt::gpu::Summarise args{};
  args.table = named.address<const int64_t>("table");
  args.tensors = int(named.integer("tensors"));
  args.sums = named.address<const float>("sums");
  args.tensor_weights = named.address<const float>("tensor_weights");
  args.global_weights = named.address<const float>("global_weights");
  args.inputs = int(named.integer("inputs"));
  args.columns = int(named.integer("columns"));
  args.squares = int(named.integer("squares"));
  args.tensor_size = int(named.integer("tensor_size"));
  args.global_size = int(named.integer("global_size"));
  args.attention = named.integer("attention");
  args.global_last = named.integer("global_last");
  args.direction_eps = float(named.real("direction_eps"));
  args.damping = float(named.real("damping"));
  args.damping_decay = float(named.real("damping_decay"));
  args.gradient_limit = float(named.real("gradient_limit"));
  args.global_hidden = named.address<float>("global_hidden");
  args.update = named.address<const float>("update");
  args.places = named.address<const int64_t>("places");
  args.skip = named.address<const float>("skip");
  args.scale = named.address<float>("scale");
  args.states = named.address<float>("states");
  args.ticket = named.address<int32_t>("ticket");
  launch("summarise", launches(emulated).summarise, args, stream);
}

static void gpu_apply(bool emulated, int64_t stream, const py::dict& values) {
  const Named named(values);
  lopt::gpu::Apply args{};
  args.table = named.address<const int64_t>("table");
  args.chunks = named.address<const int32_t>("chunks");
  args.tensors = int(named.integer("tensors"));
  args.chunk_count = int(named.integer("chunk_count"));
  args.update = named.address<const float>("update");
  args.attention_update = named.address<const float>("attention_update");
  args.scale = named.address<const float>("scale");
  args.skip = named.address<const float>("skip");
  launch("apply", launches(emulated).apply, args, stream);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of lopt: raw pointers in, nothing of torch.";
  m.attr("__version__") = LOPT_VERSION;
  m.def("compiled", &compiled, "How this module was built: compiler, isas (weakest first), openmp, cuda (archs or None).");
  m.def("isa", [] { return active().isa; }, "The instruction set whose code runs: the strongest of this processor.");
  m.def("use_isa", [](const std::string& isa) { active() = strongest(isa); }, py::arg("isa"),
        "Run the code of another instruction set; '' returns to the strongest. Raises ValueError where it cannot run.");
  py::class_<lopt::Meta>(m, "Meta", "Meta-parameters, packed for the CPU kernels.");
  m.def("pack", &pack, py::arg("config"), py::arg("addresses"), "Options and named addresses of float arrays -> Meta.");
  m.def("advance", &advance, "Stage 1, see lopt/backends/cpu.py.");
  m.def("summarise", &summarise, "Stage 2.");
  m.def("apply", &apply, "Stage 3.");
  m.def("map", &map, "A function of csrc/simd.h over an array of floats, for tests.");
  m.def("meta_forward", &meta_forward, "The parameter level of many models, see lopt/backends/cpu_flat.py.");
  m.def("meta_backward", &meta_backward, "Its derivative.");
  m.def("gpu_layout", &gpu_layout, "Columns of the tables of the GPU kernels, offsets of weights, sizes of scratch memory.");
  m.def("gpu_check", [] { return launches(false).check(); },
        "Why the current device cannot run the kernels, or None. Raises RuntimeError where none were compiled.");
  m.def("gpu_advance", &gpu_advance, "Stage 1 on a GPU, or emulated on the host, see lopt/backends/cuda.py.");
  m.def("gpu_summarise", &gpu_summarise, "Stage 2.");
  m.def("gpu_apply", &gpu_apply, "Stage 3.");
}
