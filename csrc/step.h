// extension_feedback_step_ and extension_adamw_step_: the rows that their kernels update and the arithmetic of one
// element, shared by CPU and CUDA. A row is one tensor of the model with everything that its update reads and writes.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "host_device.h"
#include "layout.h"

namespace pyfeedback {

// The operands of a row: the tensor that is updated, what it reads, then its states.
enum StepOperand { kStepped, kWeight, kGrad, kState };

template <int kCount>
struct StepRow {
  static constexpr int kOperands = kCount;
  static constexpr bool writes(int k) { return k != kWeight && k != kGrad; }

  void* operand[kOperands];  // null if the row has no such operand
  int64_t numel;
  double decay, self, tie;
  uint32_t index;  // in the lists of the op; selects the noise
  Dtype dtype;
  int32_t layout;      // index into the layouts of the plan, or -1 if element i of every operand is at offset i
  bool with_previous;  // shares memory with the row before it: one thread updates element i of both, in their order

  PYFEEDBACK_HOST_DEVICE bool has(int k) const { return operand[k] != nullptr; }
};

// The gradient that both steps follow. T is double for float64 tensors and float for all others.
template <typename T>
struct FeedbackGradient {
  T decay, self, tie;

  // The caller passes zero for an operand that the row does not have.
  PYFEEDBACK_HOST_DEVICE T gradient(T stepped, T weight, T grad) const {
    return decay * stepped - self * weight + tie * grad;
  }
};

// SGD. The only state is the momentum buffer, which a row has if momentum is not zero.

using FeedbackRow = StepRow<4>;

// The factors and the seed offset that may change between replays of a captured step. The kernel reads them.
enum Dynamic { kLrFactor, kDecayFactor, kSelfFactor, kTieFactor, kSeedOffset, kDynamics };

struct FeedbackOptions {
  double lr, momentum, noise;
  uint64_t seed;
  bool nesterov, skip_nonfinite;
  const double* dynamic;  // null, or [kDynamics] on the device of the tensors

  PYFEEDBACK_HOST_DEVICE double factor(Dynamic which) const { return dynamic ? dynamic[which] : 1; }

  PYFEEDBACK_HOST_DEVICE uint64_t current_seed() const {
    return dynamic ? seed + static_cast<uint64_t>(static_cast<int64_t>(dynamic[kSeedOffset])) : seed;
  }
};

template <typename T>
struct FeedbackStep : FeedbackGradient<T> {
  static constexpr bool kHasOptionalState = true;
  T lr, momentum;
  bool nesterov;

  // The new feedback. `buffer` is null without momentum.
  PYFEEDBACK_HOST_DEVICE T next(T feedback, T gradient, T* buffer) const {
    if (buffer == nullptr) return feedback - lr * gradient;
    *buffer = momentum * *buffer + gradient;
    return feedback - lr * (nesterov ? gradient + momentum * *buffer : *buffer);
  }
};

template <typename T>
PYFEEDBACK_HOST_DEVICE FeedbackStep<T> make_step(const FeedbackRow& row, const FeedbackOptions& options) {
  return {
      {static_cast<T>(row.decay * options.factor(kDecayFactor)), static_cast<T>(row.self * options.factor(kSelfFactor)),
       static_cast<T>(row.tie * options.factor(kTieFactor))},
      static_cast<T>(options.lr * options.factor(kLrFactor)),
      static_cast<T>(options.momentum),
      options.nesterov};
}

// AdamW. The states are exp_avg and exp_avg_sq.

struct AdamWRow : StepRow<5> {
  double kept;                   // factor that weight decay multiplies the parameter by
  double step_size, root_scale;  // include the bias corrections
};

struct AdamWOptions {
  double lr, beta1, beta2, eps;

  static constexpr double noise = 0;
  static constexpr uint64_t current_seed() { return 0; }
};

template <typename T>
struct AdamWStep : FeedbackGradient<T> {
  static constexpr bool kHasOptionalState = false;
  T rest1, beta2, rest2, eps;  // rest is 1 - beta
  T kept, step_size, root_scale;

  // The new parameter. `moment` points to exp_avg and exp_avg_sq.
  PYFEEDBACK_HOST_DEVICE T next(T param, T gradient, T* moment) const {
    T &mean = moment[0], &square = moment[1];
    mean += rest1 * (gradient - mean);
    square = beta2 * square + rest2 * gradient * gradient;
    return kept * param - step_size * mean / (std::sqrt(square) / root_scale + eps);
  }
};

template <typename T>
PYFEEDBACK_HOST_DEVICE AdamWStep<T> make_step(const AdamWRow& row, const AdamWOptions& options) {
  return {{static_cast<T>(row.decay), static_cast<T>(row.self), static_cast<T>(row.tie)},
          static_cast<T>(1 - options.beta1),
          static_cast<T>(options.beta2),
          static_cast<T>(1 - options.beta2),
          static_cast<T>(options.eps),
          static_cast<T>(row.kept),
          static_cast<T>(row.step_size),
          static_cast<T>(row.root_scale)};
}

}  // namespace pyfeedback
