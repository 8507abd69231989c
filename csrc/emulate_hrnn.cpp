// The GPU kernels of hrnn_gpu.h on the host: blocks in their order, threads in theirs, on memory of the host; what a warp does
// together, by gpu_mma.h lane by lane. Slow; what a machine without a GPU can check of them, tests/kernels/test_hrnn.py does
// through this.

#define LOPT_ISA emulated_kernels
#include "hrnn_gpu.h"

#include <memory>

namespace lopt::LOPT_ISA {
namespace {

template <class Shared, int threads, class Kernel, class Args>
void run(Kernel kernel, int blocks, const Args& args) {
  const auto shared = std::make_unique<Shared>();
  for (int index = 0; index < blocks; index++) kernel(Block<threads>{index}, args, *shared);
}

template <class V, bool compact>
void run_advance(const gpu::Advance& args) {
  using B = Block<kAdvanceThreads>;
  run<AdvanceShared<compact>, B::threads>(advance<V, compact, B>, args.chunk_count, args);
}

const char* launch_advance(const gpu::Advance& args, void*) {
  run<PrepareShared, kStreamThreads>(prepare<Block<kStreamThreads>>, args.tensors + args.chunk_count, args);
  static constexpr decltype(&run_advance<Variant<0, 1>, false>) kernels[2][2] = {
      {run_advance<Variant<0, 1>, false>, run_advance<Variant<0, 1>, true>},
      {run_advance<Variant<1, 1>, false>, run_advance<Variant<1, 1>, true>}};
  kernels[args.attention][args.compact](args);
  return nullptr;
}

const char* launch_summarise(const gpu::Summarise& args, void*) {
  run<SummaryShared, kSummaryThreads>(summarise<Block<kSummaryThreads>>, args.tensors, args);
  return nullptr;
}

const char* launch_apply(const gpu::Apply& args, void*) {
  using B = Block<kStreamThreads>;
  for (int index = 0; index < args.chunk_count; index++)
    args.attention_update ? apply<true>(B{index}, args) : apply<false>(B{index}, args);
  return nullptr;
}

}  // namespace
}  // namespace lopt::LOPT_ISA

namespace lopt::gpu {

const Launches emulated = {emulated_kernels::launch_advance, emulated_kernels::launch_summarise, emulated_kernels::launch_apply,
                           []() -> const char* { return nullptr; }};

}  // namespace lopt::gpu
