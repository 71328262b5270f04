// The functions that the ops of ops.h call on the CPU. Each function divides its work among threads and calls the
// kernels of kernels.h.
#pragma once

#include <cstdint>

#include "../checks/plans.h"

namespace pyfeedback::cpu {

// The number of elements that justify another thread: about 20 us of work.
constexpr int64_t kGrain = 16384;

class Backend {
 public:
  explicit Backend(const Device&) {}

  void feedback_step(const FeedbackPlan& plan, const FeedbackOptions& options) const;
  void adamw_step(const AdamWPlan& plan, const AdamWOptions& options) const;
  void alignment_products(const AlignmentPlan& plan, const Tensor& products) const;
  void center(const CenterOperands& operands) const;
  void add_centered(const CenterOperands& operands, double beta, double alpha) const;
  void depthwise_backward(const DepthwiseLayer& layer) const;
  void dense_backward(const DepthwiseLayer& layer, bool center) const;
  void probe_gradients(const ProbeOperands& operands) const;
};

}  // namespace pyfeedback::cpu
