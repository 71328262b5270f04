// What the torch side calls: parameters in, one error out, everything on the stream and nothing waits for it.
//
// Unmeasured: these kernels compile for sm_80 and sm_90 without spills and run on the host (csrc/simt), but have not
// run on a GPU yet, so no provider takes them by default.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "../feedback_step.h"

namespace pyfeedback::cuda {

constexpr int kThreads = 256;  // of every block

// One step of a whole model. `nonfinite` is null, or an int on the device that holds zero; it comes to 1, and nothing
// is written, where weight or grad of any tensor has an inf or a nan.
cudaError_t launch_step(const std::vector<StepTensor>& tensors, const std::vector<StepLayout>& layouts,
                        const StepOptions& options, int* nonfinite, cudaStream_t stream);

struct CenterLaunch {
  const void* input;  // [samples, positions], samples `stride` elements apart
  void* output;       // [samples, positions]
  int64_t samples, positions, stride;
  Dtype dtype;
};

cudaError_t launch_center(const CenterLaunch& launch, cudaStream_t stream);

}  // namespace pyfeedback::cuda
