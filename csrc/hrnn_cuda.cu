// Launches of the blocks in hrnn_gpu.h on a GPU: four a step, on the given stream of the current device.

#define LOPT_ISA cuda_kernels
#include "hrnn_gpu.h"

#include <cuda_runtime.h>

namespace lopt::LOPT_ISA {
namespace {

__global__ void __launch_bounds__(kStreamThreads) hrnn_prepare(const gpu::Advance args) {
  __shared__ PrepareShared shared;
  prepare(Block<kStreamThreads>{int(blockIdx.x)}, args, shared);
}

template <class V, bool compact>
__global__ void __launch_bounds__(kAdvanceThreads, kAdvanceBlocks) hrnn_advance(const gpu::Advance args) {
  __shared__ alignas(16) AdvanceShared<compact> shared;
  advance<V, compact>(Block<kAdvanceThreads>{int(blockIdx.x)}, args, shared);
}

__global__ void __launch_bounds__(kSummaryThreads) hrnn_summarise(const gpu::Summarise args) {
  __shared__ SummaryShared shared;
  summarise(Block<kSummaryThreads>{int(blockIdx.x)}, args, shared);
}

template <bool attention>
__global__ void __launch_bounds__(kStreamThreads) hrnn_apply(const gpu::Apply args) {
  apply<attention>(Block<kStreamThreads>{int(blockIdx.x)}, args);
}

template <class Args>
const char* launch(void (*kernel)(Args), int blocks, int threads, const Args& args, void* stream) {
  void* pointers[] = {const_cast<Args*>(&args)};
  const cudaError_t status = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), pointers, 0,
                                              static_cast<cudaStream_t>(stream));
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

const char* launch_advance(const gpu::Advance& args, void* stream) {
  if (const char* error = launch(hrnn_prepare, args.tensors + args.chunk_count, kStreamThreads, args, stream)) return error;
  static constexpr decltype(&hrnn_advance<Variant<0, 1>, false>) kernels[2][2] = {
      {hrnn_advance<Variant<0, 1>, false>, hrnn_advance<Variant<0, 1>, true>},
      {hrnn_advance<Variant<1, 1>, false>, hrnn_advance<Variant<1, 1>, true>}};
  return launch(kernels[args.attention][args.compact], args.chunk_count, kAdvanceThreads, args, stream);
}

const char* launch_summarise(const gpu::Summarise& args, void* stream) {
  return launch(hrnn_summarise, args.tensors, kSummaryThreads, args, stream);
}

const char* launch_apply(const gpu::Apply& args, void* stream) {
  const auto kernel = args.attention_update ? hrnn_apply<true> : hrnn_apply<false>;
  return launch(kernel, args.chunk_count, kStreamThreads, args, stream);
}

const char* check() {
  cudaFuncAttributes found;
  const cudaError_t status = cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(hrnn_prepare));
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is told; nobody else has to meet it
  return cudaGetErrorString(status);
}

}  // namespace
}  // namespace lopt::LOPT_ISA

namespace lopt::gpu {
const Launches cuda = {cuda_kernels::launch_advance, cuda_kernels::launch_summarise, cuda_kernels::launch_apply,
                       cuda_kernels::check};
}  // namespace lopt::gpu
