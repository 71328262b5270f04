// What the torch side calls: parameters in, one error out, everything on the stream and nothing waits for it.
//
// Unmeasured: these kernels compile for sm_80 and sm_90 without spills and run on the host (csrc/simt), but have not
// run on a GPU yet, so no provider takes them by default.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "../alignment.h"
#include "../depthwise.h"
#include "../feedback_step.h"

namespace pyfeedback::cuda {

constexpr int kThreads = 256;  // of every block

// One step of a whole model. `nonfinite` is null, or an int on the device that holds zero; it comes to 1, and nothing
// is written, where weight or grad of any tensor has an inf or a nan.
cudaError_t launch_step(const std::vector<StepTensor>& tensors, const std::vector<StepLayout>& layouts,
                        const StepOptions& options, int* nonfinite, cudaStream_t stream);

// The products of all pairs: `products` is [.., kProducts], of which rows without a pair are left alone. `partial` is
// room for [alignment_blocks(pairs), kProducts], `arrived` zero for every row of products; all of it on the device.
cudaError_t launch_alignment(const std::vector<AlignmentPair>& pairs, const std::vector<PairLayout>& layouts,
                             double* partial, unsigned* arrived, double* products, cudaStream_t stream);

int64_t alignment_blocks(const std::vector<AlignmentPair>& pairs);

struct CenterLaunch {
  const void* input;  // [samples, positions], samples `stride` elements apart
  void* output;       // [samples, positions]
  int64_t samples, positions, stride;
  Dtype dtype;
};

cudaError_t launch_center(const CenterLaunch& launch, cudaStream_t stream);

// output = beta * output + alpha * (input minus its mean over the samples)
cudaError_t launch_add_centered(const CenterLaunch& launch, double beta, double alpha, cudaStream_t stream);

// The backward of a depthwise or grouped convolution. `partial` is room for [depthwise_partial(layer)] on the device.
cudaError_t launch_depthwise(const DepthwiseLayer& layer, double* partial, cudaStream_t stream);

int64_t depthwise_partial(const DepthwiseLayer& layer);

}  // namespace pyfeedback::cuda
