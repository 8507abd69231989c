// What csrc/hrnn_cuda.cu needs of the CUDA runtime, without a GPU: a launch calls a function of the test's instead.
#include <cstring>
#include <map>
#include <string>

#include "hrnn_cuda.h"

struct Dim {
  unsigned x, y, z;
};
using Launched = int (*)(const char* kernel, Dim blocks, Dim threads, const void* const* args, size_t shared);

static std::map<const void*, std::string>& kernels() {  // filled before this file's variables would be made
  static std::map<const void*, std::string> names;
  return names;
}
static Launched launched;
static void* handle[1];

extern "C" {
void** __cudaRegisterFatBinary(void*) { return handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[stub] = name;
}
int cudaLaunchKernel(const void* stub, Dim blocks, Dim threads, void** args, size_t shared, void*) {
  return launched(kernels().at(stub).c_str(), blocks, threads, args, shared);
}
int cudaFuncGetAttributes(void*, const void*) { return 0; }
int cudaGetLastError() { return 0; }
// Of launches as kernel<<<...>>>(...), which there are none of:
int __cudaGetKernel(void**, const void*) { return 1; }
int __cudaLaunchKernel(void*, Dim, Dim, void**, size_t, void*) { return 1; }
int __cudaPopCallConfiguration(Dim*, Dim*, size_t*, void*) { return 1; }
const char* cudaGetErrorString(int) { return "the simulated launch failed"; }

void lopt_follow(Launched function) { launched = function; }
const char* lopt_advance(const lopt::gpu::Advance* args) { return lopt::gpu::cuda.advance(*args, nullptr); }
const char* lopt_summarise(const lopt::gpu::Summarise* args) { return lopt::gpu::cuda.summarise(*args, nullptr); }
const char* lopt_apply(const lopt::gpu::Apply* args) { return lopt::gpu::cuda.apply(*args, nullptr); }
}
