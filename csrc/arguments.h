// Unpacks and checks what the dispatcher hands to the native ops. Python validates for the user; the checks here keep
// memory safe whoever calls.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "adamw_step.h"
#include "alignment.h"
#include "feedback_step.h"
#include "tensors.h"

namespace pyfeedback {

// The arguments of native_feedback_step_ as the schema orders them; the lists own their tensors.
struct StepArguments {
  TensorList feedback, weight, grad, momentum_buffer;
  const std::vector<double>&decay, &self, &tie;
  const std::optional<torch::stable::Tensor>& dynamic;
  StepOptions options;
};

StepOptions step_options(double lr, double momentum, bool nesterov, double noise, int64_t seed,
                         const std::optional<torch::stable::Tensor>& dynamic);

using StepPlan = Plan<StepTensor, kStepOperands>;

StepPlan plan_step(const StepArguments& arguments);

// The arguments of native_adamw_step_.
struct AdamWArguments {
  TensorList param, weight, grad, exp_avg, exp_avg_sq, step;
  const std::vector<double>&decay, &self, &tie, &weight_decay;
  AdamWOptions options;
};

using AdamWPlan = Plan<AdamWTensor, kAdamWOperands>;

AdamWPlan plan_adamw(const AdamWArguments& arguments);

// The count of steps of one tensor: one float32 on the CPU.
View step_count(AtenTensorHandle step);

using AlignmentPlan = Plan<AlignmentPair, 2>;

AlignmentPlan plan_alignment(const TensorList& feedback, const TensorList& weight);

// Zeros [pairs, kProducts] of float64 on the device of the first feedback weight: the dispatcher knows none without it.
torch::stable::Tensor zero_products(const TensorList& feedback);

// input[:samples] as `samples` dense blocks of `positions` elements, `stride` elements apart.
struct SampleBlocks {
  int64_t samples, positions, stride;
  Dtype dtype;
};

SampleBlocks sample_blocks(const torch::stable::Tensor& input, int64_t samples);

// The blocks of input, of which self has as many in the same order. Raises where the two differ in shape, strides
// within a sample, dtype or device, or where the samples of self are apart.
SampleBlocks sample_blocks_like(const torch::stable::Tensor& self, const torch::stable::Tensor& input);

// Uninitialised, shaped and strided like input[:samples] with the samples one after the other.
torch::stable::Tensor empty_samples(const torch::stable::Tensor& input, const SampleBlocks& blocks);

}  // namespace pyfeedback
