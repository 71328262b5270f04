// The launch functions of the kernels. They enqueue their work on the stream and return an error without waiting.
//
// Unmeasured: the kernels compile for sm_80 and sm_90 without spills and run on the host (csrc/cuda_emulator), but have
// not run on a GPU yet. Only backend("extension") uses them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "../alignment.h"
#include "../center.h"
#include "../depthwise.h"
#include "../step.h"

namespace pyfeedback::cuda {

constexpr int kThreads = 256;  // of every block

// One step of a whole model. `nonfinite` is null, or an int on the device that is zero. If weight or grad of any row
// has an inf or a nan, it becomes 1 and nothing else is written.
cudaError_t launch_step(const std::vector<FeedbackRow>& rows, const std::vector<RowLayout<FeedbackRow>>& layouts,
                        const FeedbackOptions& options, int* nonfinite, cudaStream_t stream);

// The products of all pairs. `products` is [.., kProducts], and its rows without a pair are not written. `partial` is a
// workspace of [alignment_blocks(pairs), kProducts]. `arrived` holds a zero for every row of products. All three are on
// the device.
cudaError_t launch_alignment(const std::vector<AlignmentPair>& pairs,
                             const std::vector<RowLayout<AlignmentPair>>& layouts, double* partial, unsigned* arrived,
                             double* products, cudaStream_t stream);

int64_t alignment_blocks(const std::vector<AlignmentPair>& pairs);

// output = input minus its mean over the samples
cudaError_t launch_center(const CenterOperands& operands, cudaStream_t stream);

// output = beta * output + alpha * (input minus its mean over the samples)
cudaError_t launch_add_centered(const CenterOperands& operands, double beta, double alpha, cudaStream_t stream);

// The backward of a depthwise or grouped convolution. `partial` is a workspace of [depthwise_partial(layer)] on the
// device.
cudaError_t launch_depthwise(const DepthwiseLayer& layer, double* partial, cudaStream_t stream);

int64_t depthwise_partial(const DepthwiseLayer& layer);

}  // namespace pyfeedback::cuda
