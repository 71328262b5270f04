// Parameters and launch functions of the CUDA kernels: what the torch side and the .cu files have in common.
//
// Unmeasured: these kernels compile for sm_80 and sm_90 without spills and have not run on a GPU yet, so no provider
// takes them by default.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../feedback_step.h"

namespace pyfeedback::cuda {

// Elements per block and thread; a thread takes the four that share one draw of noise.
constexpr int kThreads = 256;
constexpr int kVector = 4;
constexpr int64_t kBlockElements = int64_t{kThreads} * kVector * 4;

// Kernel parameters are passed by value and may take 4 KB: so many tensors go into one launch.
constexpr int kLaunchTensors = 45;

struct StepLaunch {
  StepOptions options;
  const int* skip;  // null, or where a nonzero value means that nothing is written
  StepTensor tensor[kLaunchTensors];
  int64_t first_block[kLaunchTensors + 1];  // [count] is the number of blocks
  int32_t count;
};
static_assert(sizeof(StepLaunch) + sizeof(int*) <= 4096, "the parameters of one launch take more than 4 KB");

// One tensor whose operands are in unlike layouts.
struct StridedLaunch {
  StepOptions options;
  const int* skip;
  StepTensor tensor;
  StepLayout layout;
};

cudaError_t launch_step(const StepLaunch& launch, cudaStream_t stream);
cudaError_t launch_step(const StridedLaunch& launch, cudaStream_t stream);

// Sets *found to 1 where weight or grad of any tensor has an inf or a nan.
cudaError_t launch_find_nonfinite(const StepLaunch& launch, int* found, cudaStream_t stream);
cudaError_t launch_find_nonfinite(const StridedLaunch& launch, int* found, cudaStream_t stream);

struct CenterLaunch {
  const void* input;  // [samples, positions], samples `stride` elements apart
  void* output;       // [samples, positions]
  int64_t samples, positions, stride;
  Dtype dtype;
};

cudaError_t launch_center(const CenterLaunch& launch, cudaStream_t stream);

}  // namespace pyfeedback::cuda
