#include "arguments.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include <torch/csrc/stable/ops.h>

#include "step_planner.h"

namespace pyfeedback {

namespace {

// One value for all rows, or one for each.
void check_length(const std::vector<double>& values, size_t count) {
  STD_TORCH_CHECK(values.size() == count || values.size() == 1, "a coefficient has ", values.size(),
                  " values; expected 1 or ", count);
}

double value_of(const std::vector<double>& values, size_t row) {
  return values[values.size() == 1 ? 0 : row];
}

void check_lengths(const StepArguments& a) {
  const size_t count = a.feedback.size();
  for (const std::vector<double>* values : {&a.decay, &a.self, &a.tie}) check_length(*values, count);
  for (const TensorList* list : {&a.weight, &a.grad, &a.momentum_buffer}) {
    STD_TORCH_CHECK(list->size() == 0 || list->size() == count, "weight, grad or momentum_buffer has ", list->size(),
                    " tensors; expected none or ", count);
  }
  STD_TORCH_CHECK(a.options.momentum == 0 || a.momentum_buffer.size() == count, "momentum is ", a.options.momentum,
                  " but momentum_buffer is empty");
}

void check_dynamic(const StepArguments& a) {
  if (!a.dynamic || a.feedback.size() == 0) return;
  const View dynamic = read_view(a.dynamic->get(), "dynamic");
  STD_TORCH_CHECK(dynamic.dtype == Dtype::kFloat64 && dynamic.shape.numel == kDynamics && dynamic.shape.contiguous &&
                      dynamic.device == device_of(a.feedback[0]),
                  "expected of dynamic ", int{kDynamics}, " contiguous float64 on the device of feedback");
}

}  // namespace

StepOptions step_options(double lr, double momentum, bool nesterov, double noise, int64_t seed,
                         const std::optional<torch::stable::Tensor>& dynamic) {
  const void* data = dynamic ? dynamic->const_data_ptr() : nullptr;
  return {lr, momentum, noise, static_cast<uint64_t>(seed), nesterov, static_cast<const double*>(data)};
}

StepPlan plan_step(const StepArguments& a) {
  check_lengths(a);
  check_dynamic(a);
  constexpr const char* kNames = "feedback, weight, grad and momentum_buffer";
  StepPlanner<StepTensor, kStepOperands> planner(kNames, a.feedback.size());
  if (a.dynamic) planner.add_read(read_view(a.dynamic->get(), "dynamic"));
  for (size_t i = 0; i < a.feedback.size(); ++i) {
    StepTensor tensor{};
    tensor.has_weight = value_of(a.self, i) != 0;
    tensor.has_grad = value_of(a.tie, i) != 0;
    tensor.has_momentum = a.options.momentum != 0;
    STD_TORCH_CHECK(!tensor.has_weight || a.weight.size(), "self_[", i, "] is ", value_of(a.self, i),
                    " but weight is empty");
    STD_TORCH_CHECK(!tensor.has_grad || a.grad.size(), "tie[", i, "] is ", value_of(a.tie, i), " but grad is empty");
    auto& views = planner.next();
    views[0] = write_view(a.feedback[i], kNames);
    if (tensor.has_weight) views[1] = read_view(a.weight[i], kNames);
    if (tensor.has_grad) views[2] = read_view(a.grad[i], kNames);
    if (tensor.has_momentum) views[3] = write_view(a.momentum_buffer[i], kNames);
    tensor.feedback = views[0].data;
    tensor.weight = views[1].data;
    tensor.grad = views[2].data;
    tensor.momentum = views[3].data;
    tensor.decay = value_of(a.decay, i);
    tensor.self = value_of(a.self, i);
    tensor.tie = value_of(a.tie, i);
    planner.add(tensor, i, a.options.noise != 0);
  }
  return planner.finish();
}

View step_count(AtenTensorHandle step) {
  const View view = write_view(step, "step");
  STD_TORCH_CHECK(
      view.shape.numel == 1 && view.dtype == Dtype::kFloat32 && view.device.type == aoti_torch_device_type_cpu(),
      "step is not one float32 on the CPU");
  return view;
}

AdamWPlan plan_adamw(const AdamWArguments& a) {
  const size_t count = a.param.size();
  for (const TensorList* list : {&a.exp_avg, &a.exp_avg_sq, &a.step}) {
    STD_TORCH_CHECK(list->size() == count, "a list has ", list->size(), " tensors; expected the ", count, " of param");
  }
  for (const TensorList* list : {&a.weight, &a.grad}) {
    STD_TORCH_CHECK(list->size() == 0 || list->size() == count, "weight or grad has ", list->size(),
                    " tensors; expected none or ", count);
  }
  for (const std::vector<double>* values : {&a.decay, &a.self, &a.tie, &a.weight_decay}) {
    check_length(*values, count);
  }
  constexpr const char* kNames = "param, weight, grad, exp_avg and exp_avg_sq";
  StepPlanner<AdamWTensor, kAdamWOperands> planner(kNames, count);
  for (size_t i = 0; i < count; ++i) {
    AdamWTensor tensor{};
    tensor.has_weight = value_of(a.self, i) != 0;
    tensor.has_grad = value_of(a.tie, i) != 0;
    STD_TORCH_CHECK(!tensor.has_weight || a.weight.size(), "self_[", i, "] is ", value_of(a.self, i),
                    " but weight is empty");
    STD_TORCH_CHECK(!tensor.has_grad || a.grad.size(), "tie[", i, "] is ", value_of(a.tie, i), " but grad is empty");
    auto& views = planner.next();
    views[kParam] = write_view(a.param[i], kNames);
    if (tensor.has_weight) views[kWeight] = read_view(a.weight[i], kNames);
    if (tensor.has_grad) views[kGrad] = read_view(a.grad[i], kNames);
    views[kMean] = write_view(a.exp_avg[i], kNames);
    views[kSquare] = write_view(a.exp_avg_sq[i], kNames);
    for (int k = 0; k < kAdamWOperands; ++k) tensor.operand[k] = views[k].data;
    const View counted = step_count(a.step[i]);
    const double steps = *static_cast<const float*>(counted.data) + 1.0;
    tensor.decay = value_of(a.decay, i);
    tensor.self = value_of(a.self, i);
    tensor.tie = value_of(a.tie, i);
    tensor.kept = 1 - a.options.lr * value_of(a.weight_decay, i);
    tensor.step_size = a.options.lr / (1 - std::pow(a.options.beta1, steps));
    tensor.root_scale = std::sqrt(1 - std::pow(a.options.beta2, steps));
    planner.add_written(counted);
    planner.add(tensor, i, false);
  }
  return planner.finish();
}

AlignmentPlan plan_alignment(const TensorList& feedback, const TensorList& weight) {
  STD_TORCH_CHECK(feedback.size() == weight.size(), "feedback has ", feedback.size(), " tensors and weight has ",
                  weight.size(), "; expected as many of both");
  AlignmentPlan plan;
  plan.rows.reserve(feedback.size());
  constexpr const char* kNames = "feedback and weight";
  for (size_t i = 0; i < feedback.size(); ++i) {
    const std::array<View, 2> operands = {read_view(feedback[i], kNames), read_view(weight[i], kNames)};
    STD_TORCH_CHECK(operands[0].device == device_of(feedback[0]), "feedback ", i,
                    " is not on the device of feedback 0");
    const bool alike = check_alike(operands, kNames, i);
    const int64_t numel = operands[0].shape.numel;
    if (numel == 0) continue;
    AlignmentPair pair{operands[0].data, operands[1].data, numel, static_cast<int32_t>(i), -1, operands[0].dtype};
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
  const View view = read_view(input.get(), "input");
  const Shape& shape = view.shape;
  STD_TORCH_CHECK(shape.dims >= 1 && shape.dims <= kMaxDims, "input has ", shape.dims, " dimensions; expected 1 to ",
                  kMaxDims);
  STD_TORCH_CHECK(samples >= 0 && samples <= shape.size[0], "samples is ", samples, "; expected 0 to ", shape.size[0],
                  ", the samples of input");
  int64_t positions = 1;
  for (int64_t d = 1; d < shape.dims; ++d) positions *= shape.size[d];
  const bool dense = positions == 0 || is_dense(shape.dims - 1, shape.size + 1, shape.stride + 1);
  STD_TORCH_CHECK(dense && (samples <= 1 || shape.stride[0] >= positions),
                  "a sample of input is no dense block; expected contiguous or channels_last");
  return {samples, positions, shape.stride[0], view.dtype};
}

SampleBlocks sample_blocks_like(const torch::stable::Tensor& self, const torch::stable::Tensor& input) {
  const View read = read_view(input.get(), "input"), written = write_view(self.get(), "self");
  check_alike<2>({read, written}, "input and self", 0);
  const SampleBlocks blocks = sample_blocks(input, read.shape.dims ? read.shape.size[0] : 0);
  bool alike = blocks.samples <= 1 || blocks.positions == 0 || written.shape.stride[0] == blocks.positions;
  for (int64_t d = 1; d < read.shape.dims; ++d) {
    alike = alike && (read.shape.size[d] == 1 || read.shape.stride[d] == written.shape.stride[d]);
  }
  STD_TORCH_CHECK(alike, "self is no dense block with the strides of input");
  return blocks;
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
