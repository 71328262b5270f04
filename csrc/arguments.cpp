#include "arguments.h"

#include <algorithm>
#include <array>

#include <torch/csrc/stable/ops.h>

namespace pyfeedback {

namespace {

void check_lengths(const StepArguments& a) {
  const size_t count = a.feedback.size();
  STD_TORCH_CHECK(a.decay.size() == count && a.self.size() == count && a.tie.size() == count,
                  "decay, self_ and tie have ", a.decay.size(), ", ", a.self.size(), " and ", a.tie.size(),
                  " values; expected one for each of the ", count, " tensors of feedback");
  for (const TensorList* list : {&a.weight, &a.grad, &a.momentum_buffer}) {
    STD_TORCH_CHECK(list->size() == 0 || list->size() == count, "weight, grad or momentum_buffer has ", list->size(),
                    " tensors; expected none or ", count);
  }
  STD_TORCH_CHECK(a.options.momentum == 0 || a.momentum_buffer.size() == count, "momentum is ", a.options.momentum,
                  " but momentum_buffer is empty");
}

}  // namespace

StepPlan plan_step(const StepArguments& a) {
  check_lengths(a);
  StepPlan plan;
  if (a.feedback.size() == 0) return plan;
  plan.rows.reserve(a.feedback.size());
  constexpr const char* kNames = "feedback, weight, grad and momentum_buffer";
  const Device device = device_of(a.feedback[0]);
  for (size_t i = 0; i < a.feedback.size(); ++i) {
    const bool reads_weight = a.self[i] != 0, reads_grad = a.tie[i] != 0;
    STD_TORCH_CHECK(!reads_weight || a.weight.size(), "self_[", i, "] is ", a.self[i], " but weight is empty");
    STD_TORCH_CHECK(!reads_grad || a.grad.size(), "tie[", i, "] is ", a.tie[i], " but grad is empty");
    const std::array<AtenTensorHandle, kStepOperands> operands = {
        a.feedback[i], reads_weight ? a.weight[i] : nullptr, reads_grad ? a.grad[i] : nullptr,
        a.momentum_buffer.size() ? a.momentum_buffer[i] : nullptr};
    const Shape shape = shape_of(a.feedback[i]);
    if (shape.numel == 0) continue;
    STD_TORCH_CHECK(device_of(a.feedback[i]) == device, "feedback ", i, " is not on the device of feedback 0");

    StepTensor tensor{};
    tensor.dtype = dtype_of(a.feedback[i]);
    const bool alike = check_alike(operands, kNames, i);
    // Noise is drawn in row-major order whatever the layout, so a noisy tensor in another one is walked too.
    tensor.layout = -1;
    if (!alike || (a.options.noise != 0 && !shape.contiguous)) {
      tensor.layout = static_cast<int32_t>(plan.layouts.size());
      check_writable(operands[0], "feedback", i);
      if (operands[3]) check_writable(operands[3], "momentum_buffer", i);
      plan.layouts.push_back(strided_layout(operands, kNames));
    }
    tensor.feedback = write_pointer(operands[0]);
    tensor.weight = operands[1] ? read_pointer(operands[1]) : nullptr;
    tensor.grad = operands[2] ? read_pointer(operands[2]) : nullptr;
    tensor.momentum = operands[3] ? write_pointer(operands[3]) : nullptr;
    tensor.numel = shape.numel;
    tensor.decay = a.decay[i];
    tensor.self = a.self[i];
    tensor.tie = a.tie[i];
    tensor.index = static_cast<uint32_t>(i);
    plan.rows.push_back(tensor);
  }
  return plan;
}

AlignmentPlan plan_alignment(const TensorList& feedback, const TensorList& weight) {
  STD_TORCH_CHECK(feedback.size() == weight.size(), "feedback has ", feedback.size(), " tensors and weight has ",
                  weight.size(), "; expected as many of both");
  AlignmentPlan plan;
  plan.rows.reserve(feedback.size());
  constexpr const char* kNames = "feedback and weight";
  for (size_t i = 0; i < feedback.size(); ++i) {
    const std::array<AtenTensorHandle, 2> operands = {feedback[i], weight[i]};
    STD_TORCH_CHECK(device_of(feedback[i]) == device_of(feedback[0]), "feedback ", i,
                    " is not on the device of feedback 0");
    const bool alike = check_alike(operands, kNames, i);
    const int64_t numel = shape_of(feedback[i]).numel;
    if (numel == 0) continue;
    AlignmentPair pair{read_pointer(feedback[i]), read_pointer(weight[i]), numel, static_cast<int32_t>(i), -1,
                       dtype_of(feedback[i])};
    if (!alike) {
      pair.layout = static_cast<int32_t>(plan.layouts.size());
      plan.layouts.push_back(strided_layout(operands, kNames));
    }
    plan.rows.push_back(pair);
  }
  return plan;
}

torch::stable::Tensor zero_products(const TensorList& feedback) {
  const int64_t size[] = {static_cast<int64_t>(feedback.size()), kProducts}, stride[] = {kProducts, 1};
  const Device device = device_of(feedback[0]);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, size, stride, aoti_torch_dtype_float64(), device.type, device.index, &handle));
  torch::stable::Tensor products(handle);
  torch::stable::zero_(products);
  return products;
}

SampleBlocks sample_blocks(const torch::stable::Tensor& input, int64_t samples) {
  const Shape shape = shape_of(input.get());
  STD_TORCH_CHECK(shape.dims >= 1 && shape.dims <= kMaxDims, "input has ", shape.dims, " dimensions; expected 1 to ",
                  kMaxDims);
  STD_TORCH_CHECK(samples >= 0 && samples <= shape.size[0], "samples is ", samples, "; expected 0 to ", shape.size[0],
                  ", the samples of input");
  int64_t positions = 1;
  for (int64_t d = 1; d < shape.dims; ++d) positions *= shape.size[d];
  const bool dense = positions == 0 || is_dense(shape.dims - 1, shape.size + 1, shape.stride + 1);
  STD_TORCH_CHECK(dense && (samples <= 1 || shape.stride[0] >= positions),
                  "a sample of input is no dense block; expected contiguous or channels_last");
  return {samples, positions, shape.stride[0], dtype_of(input.get())};
}

torch::stable::Tensor empty_samples(const torch::stable::Tensor& input, const SampleBlocks& blocks) {
  const Shape shape = shape_of(input.get());
  std::array<int64_t, kMaxDims> size, stride;
  std::copy_n(shape.size, shape.dims, size.begin());
  std::copy_n(shape.stride, shape.dims, stride.begin());
  size[0] = blocks.samples;
  stride[0] = blocks.positions;
  int32_t dtype, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(input.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(input.get(), &device_index));
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(shape.dims, size.data(), stride.data(), dtype, device_type, device_index, &result));
  return torch::stable::Tensor(result);
}

}  // namespace pyfeedback
