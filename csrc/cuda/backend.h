// The functions that the ops of ops.h call on a CUDA device. Each function launches kernels of launch.h on the current
// stream and does not wait for them.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../checks/plans.h"
#include "launch.h"

namespace pyfeedback::cuda {

class Backend {
 public:
  // Makes the device current for the lifetime of the backend.
  explicit Backend(const Device& device);

  void feedback_step(const FeedbackPlan& plan, const FeedbackOptions& options) const;
  void alignment_products(const AlignmentPlan& plan, const Tensor& products) const;
  void center(const CenterOperands& operands) const;
  void add_centered(const CenterOperands& operands, double beta, double alpha) const;
  void depthwise_backward(const DepthwiseLayer& layer) const;

 private:
  // One-dimensional and uninitialized.
  Tensor workspace(int32_t dtype, int64_t size) const;
  // int32 that are set to zero in the order of the stream.
  Tensor zeros(int64_t size) const;

  const Device device_;
  const torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace pyfeedback::cuda
