// Unpacks and checks what the dispatcher hands to the native ops. Python validates for the user; the checks here keep
// memory safe whoever calls.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "feedback_step.h"

namespace pyfeedback {

Dtype dtype_of(AtenTensorHandle tensor);

// Owns the tensors of a `Tensor[]` argument. std::vector<torch::stable::Tensor> would put every handle into a
// shared_ptr of its own, a third of the whole cost of a step over many small tensors.
class TensorList {
 public:
  explicit TensorList(StableListHandle list);
  ~TensorList();
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t index) const { return handles_[index]; }

 private:
  StableListHandle list_;
  std::vector<AtenTensorHandle> handles_;
};

// The arguments of native_feedback_step_ as the schema orders them; the lists own their tensors.
struct StepArguments {
  TensorList feedback, weight, grad, momentum_buffer;
  const std::vector<double>&decay, &self, &tie;
  StepOptions options;
};

// Every non-empty tensor of the model, and the layouts that StepTensor::layout points into.
struct StepPlan {
  std::vector<StepTensor> tensors;
  std::vector<StepLayout> layouts;
};

StepPlan plan_step(const StepArguments& arguments);

// input[:samples] as `samples` dense blocks of `positions` elements, `stride` elements apart.
struct SampleBlocks {
  int64_t samples, positions, stride;
  Dtype dtype;
};

SampleBlocks sample_blocks(const torch::stable::Tensor& input, int64_t samples);

// Uninitialised, shaped and strided like input[:samples] with the samples one after the other.
torch::stable::Tensor empty_samples(const torch::stable::Tensor& input, const SampleBlocks& blocks);

}  // namespace pyfeedback
