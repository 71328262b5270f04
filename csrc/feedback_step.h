// The arithmetic of native_feedback_step_, shared by CPU and CUDA, and the tensors it runs over.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"
#include "layout.h"

namespace pyfeedback {

// One element's update; Wide is double for float64 tensors and float for the others.
template <typename Wide>
struct FeedbackStep {
  Wide decay, self, tie, noise, lr, momentum;
  bool nesterov;

  // A tensor that takes no part is not read: the caller passes zero for it.
  PYFEEDBACK_HOST_DEVICE Wide gradient(Wide feedback, Wide weight, Wide grad) const {
    return decay * feedback - self * weight + tie * grad;
  }

  // What the step follows; `buffer` becomes momentum * buffer + gradient.
  PYFEEDBACK_HOST_DEVICE Wide direction(Wide gradient, Wide& buffer) const {
    buffer = momentum * buffer + gradient;
    return nesterov ? gradient + momentum * buffer : buffer;
  }
};

constexpr int kStepOperands = 4;

// Of feedback, weight, grad and momentum, where they do not share one dense layout.
using StepLayout = Layout<kStepOperands>;

// One tensor of the model. An operand is read where its flag says so, whatever its pointer.
struct StepTensor {
  void* feedback;
  const void* weight;
  const void* grad;
  void* momentum;
  int64_t numel;
  double decay, self, tie;
  uint32_t index;  // place in the list, which the noise is drawn for
  Dtype dtype;
  int32_t layout;  // place in the list of layouts, or -1: element i of every operand is at i
  bool has_weight, has_grad, has_momentum;
  // Reads what the row before it reads, or is it: element i of both is one thread's, in their order.
  bool with_previous;
};

// What may change between replays of a captured step, read when it runs: factors, and what is added to the seed.
enum Dynamic { kLrFactor, kDecayFactor, kSelfFactor, kTieFactor, kSeedAddend, kDynamics };

struct StepOptions {
  double lr, momentum, noise;
  uint64_t seed;
  bool nesterov;
  const double* dynamic;  // null, or [kDynamics] on the device of the tensors

  PYFEEDBACK_HOST_DEVICE double factor(Dynamic which) const { return dynamic ? dynamic[which] : 1; }

  PYFEEDBACK_HOST_DEVICE uint64_t current_seed() const {
    return dynamic ? seed + static_cast<uint64_t>(static_cast<int64_t>(dynamic[kSeedAddend])) : seed;
  }
};

template <typename Wide>
PYFEEDBACK_HOST_DEVICE FeedbackStep<Wide> make_step(const StepTensor& tensor, const StepOptions& options) {
  return {static_cast<Wide>(tensor.decay * options.factor(kDecayFactor)),
          static_cast<Wide>(tensor.self * options.factor(kSelfFactor)),
          static_cast<Wide>(tensor.tie * options.factor(kTieFactor)),
          static_cast<Wide>(options.noise),
          static_cast<Wide>(options.lr * options.factor(kLrFactor)),
          static_cast<Wide>(options.momentum),
          options.nesterov};
}

}  // namespace pyfeedback
