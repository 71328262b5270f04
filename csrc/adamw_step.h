// The arithmetic of native_adamw_step_, shared by CPU and CUDA, and the tensors it runs over.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "host_device.h"
#include "layout.h"

namespace pyfeedback {

// One element's update; Wide is double for float64 tensors and float for the others.
template <typename Wide>
struct AdamWStep {
  Wide decay, self, tie;
  Wide rest1, beta2, rest2, eps;  // rest is 1 - beta
  Wide kept, step_size, root_scale;

  // A tensor that takes no part is not read: the caller passes zero for it.
  PYFEEDBACK_HOST_DEVICE Wide gradient(Wide param, Wide weight, Wide grad) const {
    return decay * param - self * weight + tie * grad;
  }

  // The new param; mean and square of the gradient move on.
  PYFEEDBACK_HOST_DEVICE Wide next(Wide param, Wide gradient, Wide& mean, Wide& square) const {
    mean += rest1 * (gradient - mean);
    square = beta2 * square + rest2 * gradient * gradient;
    return kept * param - step_size * mean / (std::sqrt(square) / root_scale + eps);
  }
};

enum AdamWOperand { kParam, kWeight, kGrad, kMean, kSquare, kAdamWOperands };

using AdamWLayout = Layout<kAdamWOperands>;

// One tensor of the model. kWeight and kGrad are read where their flags say so, whatever their pointers.
struct AdamWTensor {
  void* operand[kAdamWOperands];
  int64_t numel;
  double decay, self, tie;
  double kept;                   // of the param by weight decay
  double step_size, root_scale;  // corrected for moments that started at zero
  uint32_t index;                // place in the list
  Dtype dtype;
  int32_t layout;  // place in the list of layouts, or -1: element i of every operand is at i
  bool has_weight, has_grad;
  bool with_previous;  // as StepTensor's

  PYFEEDBACK_HOST_DEVICE bool has(int operand) const {
    return operand == kWeight ? has_weight : operand == kGrad ? has_grad : true;
  }
};

struct AdamWOptions {
  double lr, beta1, beta2, eps;
};

template <typename Wide>
PYFEEDBACK_HOST_DEVICE AdamWStep<Wide> make_step(const AdamWTensor& tensor, const AdamWOptions& options) {
  return {static_cast<Wide>(tensor.decay),      static_cast<Wide>(tensor.self),   static_cast<Wide>(tensor.tie),
          static_cast<Wide>(1 - options.beta1), static_cast<Wide>(options.beta2), static_cast<Wide>(1 - options.beta2),
          static_cast<Wide>(options.eps),       static_cast<Wide>(tensor.kept),   static_cast<Wide>(tensor.step_size),
          static_cast<Wide>(tensor.root_scale)};
}

}  // namespace pyfeedback
