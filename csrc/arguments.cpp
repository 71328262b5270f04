#include "arguments.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

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

bool same_tensor(AtenTensorHandle a, AtenTensorHandle b) {
  if (a == nullptr || b == nullptr || read_pointer(a) != read_pointer(b)) return false;
  const Shape first = shape_of(a), second = shape_of(b);
  return first.dims == second.dims && std::equal(first.size, first.size + first.dims, second.size) &&
         std::equal(first.stride, first.stride + first.dims, second.stride);
}

// Adds rows whose operands are what is stepped, weight, grad, and the states of what is stepped.
template <typename Row, size_t kOperands>
class StepPlanner {
 public:
  using Operands = std::array<AtenTensorHandle, kOperands>;

  StepPlanner(const char* names, size_t count) : names_(names) {
    plan_.rows.reserve(count);
    operands_.reserve(count);
  }

  // `row_major` wants that order even of operands that share another one.
  void add(Row row, const Operands& operands, size_t index, bool row_major) {
    const Shape shape = shape_of(operands[0]);
    if (shape.numel == 0) return;
    const Device device = device_of(operands[0]);
    STD_TORCH_CHECK(plan_.rows.empty() || device == device_, names_, " ", index, " are not on the device of the first");
    device_ = device;
    row.numel = shape.numel;
    row.index = static_cast<uint32_t>(index);
    row.dtype = dtype_of(operands[0]);
    row.layout = -1;
    const bool alike = check_alike(operands, names_, index);
    if (!alike || (row_major && !shape.contiguous)) place(row, operands);
    if (!plan_.rows.empty()) {
      const Operands& previous = operands_.back();
      row.with_previous = same_tensor(previous[1], operands[0]) || same_tensor(previous[1], operands[1]) ||
                          same_tensor(previous[2], operands[2]);
    }
    plan_.rows.push_back(row);
    operands_.push_back(operands);
  }

  // Rows that share memory are all dense, and then in the order of what they share, or all row-major.
  Plan<Row, kOperands> finish() {
    std::vector<Row>& rows = plan_.rows;
    for (size_t first = 0, last; first < rows.size(); first = last) {
      last = first + 1;
      while (last < rows.size() && rows[last].with_previous) ++last;
      const auto placed = [](const Row& row) { return row.layout >= 0; };
      if (std::none_of(rows.begin() + first, rows.begin() + last, placed)) continue;
      for (size_t i = first; i < last; ++i) {
        if (!placed(rows[i])) place(rows[i], operands_[i]);
      }
    }
    return std::move(plan_);
  }

 private:
  void place(Row& row, const Operands& operands) {
    for (size_t k = 0; k < kOperands; ++k) {
      if (operands[k] && k != 1 && k != 2) check_writable(operands[k], names_, row.index);
    }
    row.layout = static_cast<int32_t>(plan_.layouts.size());
    plan_.layouts.push_back(strided_layout(operands, names_));
  }

  const char* names_;
  Device device_;
  Plan<Row, kOperands> plan_;
  std::vector<Operands> operands_;  // of each row
};

void check_dynamic(const StepArguments& a) {
  if (!a.dynamic || a.feedback.size() == 0) return;
  const AtenTensorHandle dynamic = a.dynamic->get();
  const Shape shape = shape_of(dynamic);
  STD_TORCH_CHECK(dtype_of(dynamic) == Dtype::kFloat64 && shape.numel == kDynamics && shape.contiguous &&
                      device_of(dynamic) == device_of(a.feedback[0]),
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
  StepPlanner<StepTensor, kStepOperands> planner("feedback, weight, grad and momentum_buffer", a.feedback.size());
  for (size_t i = 0; i < a.feedback.size(); ++i) {
    const bool reads_weight = a.self[i] != 0, reads_grad = a.tie[i] != 0;
    STD_TORCH_CHECK(!reads_weight || a.weight.size(), "self_[", i, "] is ", a.self[i], " but weight is empty");
    STD_TORCH_CHECK(!reads_grad || a.grad.size(), "tie[", i, "] is ", a.tie[i], " but grad is empty");
    const std::array<AtenTensorHandle, kStepOperands> operands = {
        a.feedback[i], reads_weight ? a.weight[i] : nullptr, reads_grad ? a.grad[i] : nullptr,
        a.momentum_buffer.size() ? a.momentum_buffer[i] : nullptr};
    StepTensor tensor{};
    tensor.feedback = write_pointer(operands[0]);
    tensor.weight = operands[1] ? read_pointer(operands[1]) : nullptr;
    tensor.grad = operands[2] ? read_pointer(operands[2]) : nullptr;
    tensor.momentum = operands[3] ? write_pointer(operands[3]) : nullptr;
    tensor.decay = a.decay[i];
    tensor.self = a.self[i];
    tensor.tie = a.tie[i];
    planner.add(tensor, operands, i, a.options.noise != 0);
  }
  return planner.finish();
}

float* step_count(AtenTensorHandle step) {
  STD_TORCH_CHECK(shape_of(step).numel == 1 && dtype_of(step) == Dtype::kFloat32 &&
                      device_of(step).type == aoti_torch_device_type_cpu(),
                  "step is not one float32 on the CPU");
  return static_cast<float*>(write_pointer(step));
}

AdamWPlan plan_adamw(const AdamWArguments& a) {
  const size_t count = a.param.size();
  for (const TensorList* list : {&a.weight, &a.grad, &a.exp_avg, &a.exp_avg_sq, &a.step}) {
    STD_TORCH_CHECK(list->size() == count, "a list has ", list->size(), " tensors; expected the ", count, " of param");
  }
  for (const std::vector<double>* values : {&a.decay, &a.self, &a.tie, &a.weight_decay}) {
    STD_TORCH_CHECK(values->size() == count, "a list has ", values->size(), " numbers; expected ", count);
  }
  StepPlanner<AdamWTensor, kAdamWOperands> planner("param, weight, grad, exp_avg and exp_avg_sq", count);
  for (size_t i = 0; i < count; ++i) {
    const std::array<AtenTensorHandle, kAdamWOperands> operands = {a.param[i], a.self[i] != 0 ? a.weight[i] : nullptr,
                                                                   a.tie[i] != 0 ? a.grad[i] : nullptr, a.exp_avg[i],
                                                                   a.exp_avg_sq[i]};
    AdamWTensor tensor{};
    for (int k = 0; k < kAdamWOperands; ++k) {
      if (operands[k] == nullptr) continue;
      const bool read_only = k == kWeight || k == kGrad;
      tensor.operand[k] = read_only ? const_cast<void*>(read_pointer(operands[k])) : write_pointer(operands[k]);
    }
    tensor.decay = a.decay[i];
    tensor.self = a.self[i];
    tensor.tie = a.tie[i];
    tensor.kept = 1 - a.options.lr * a.weight_decay[i];
    const double steps = *step_count(a.step[i]) + 1;
    tensor.step_size = a.options.lr / (1 - std::pow(a.options.beta1, steps));
    tensor.root_scale = std::sqrt(1 - std::pow(a.options.beta2, steps));
    planner.add(tensor, operands, i, false);
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

SampleBlocks sample_blocks_like(const torch::stable::Tensor& self, const torch::stable::Tensor& input) {
  check_alike<2>({input.get(), self.get()}, "input and self", 0);
  const Shape shape = shape_of(input.get()), written = shape_of(self.get());
  const int64_t samples = shape.dims ? shape.size[0] : 0;
  const SampleBlocks blocks = sample_blocks(input, samples);
  bool alike = samples <= 1 || blocks.positions == 0 || written.stride[0] == blocks.positions;
  for (int64_t d = 1; d < shape.dims; ++d) {
    alike = alike && (shape.size[d] == 1 || shape.stride[d] == written.stride[d]);
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
