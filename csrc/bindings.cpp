// The Python face of lopt._C. It is compiled once for the baseline processor; hrnn_*.cpp is compiled once per instruction
// set, each in a namespace of that set's name. setup.py defines
//     LOPT_FOR_EACH_ISA(X)   X(v2) X(v3) X(v4) on x86-64, X(generic) elsewhere; weakest first
//     LOPT_VERSION           the package's version
//     LOPT_CUDA_ARCHS        what the .cu files are compiled for; undefined without them

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

// Whether this processor runs code compiled for `isa`.
static bool runs(const char* isa) {
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

static std::string isa() {
  const char* best = "";
#define LOPT_TRY(isa) best = runs(#isa) ? #isa : best;
  LOPT_FOR_EACH_ISA(LOPT_TRY)
#undef LOPT_TRY
  return best;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of lopt: raw pointers in, nothing of torch.";
  m.attr("__version__") = LOPT_VERSION;
  m.def("compiled", &compiled, "How this module was built: compiler, isas (weakest first), openmp, cuda (archs or None).");
  m.def("isa", &isa, "The instruction set whose code runs on this processor.");
}
