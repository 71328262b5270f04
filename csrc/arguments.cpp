#include "arguments.h"

#include <algorithm>
#include <array>

#include <torch/headeronly/util/Exception.h>

namespace pyfeedback {

namespace {

// Sizes and strides borrowed from a tensor, and whether it is contiguous.
struct Shape {
  int64_t dims;
  int64_t numel;
  const int64_t* size;
  const int64_t* stride;
  bool contiguous;
};

Shape shape_of(AtenTensorHandle tensor) {
  Shape shape;
  int64_t *size, *stride;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &shape.dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &shape.numel));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &size));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &stride));
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &shape.contiguous));
  shape.size = size;
  shape.stride = stride;
  return shape;
}

// Whether the dimensions, in some order, fill one block without holes. `dims` is at most kMaxDims.
bool is_dense(int64_t dims, const int64_t* size, const int64_t* stride) {
  std::array<bool, kMaxDims> placed{};
  int64_t block = 1;
  for (int64_t round = 0; round < dims; ++round) {
    for (int64_t d = 0; d < dims; ++d) {
      if (placed[d] || (size[d] != 1 && stride[d] != block)) continue;
      placed[d] = true;
      block *= size[d];
    }
  }
  return std::all_of(placed.begin(), placed.begin() + dims, [](bool is_placed) { return is_placed; });
}

bool same_strides(const Shape& a, const Shape& b) {
  for (int64_t d = 0; d < a.dims; ++d) {
    if (a.size[d] != 1 && a.stride[d] != b.stride[d]) return false;
  }
  return true;
}

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

Device device_of(AtenTensorHandle tensor) {
  Device device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &device.index));
  return device;
}

const void* read_pointer(AtenTensorHandle tensor) {
  const void* data;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &data));
  return data;
}

void* write_pointer(AtenTensorHandle tensor) {
  void* data;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &data));
  return data;
}

// A strided walk over the operands that are there (null handles are not), each checked to have `shape`.
StepLayout strided_layout(const std::array<AtenTensorHandle, kStepOperands>& operands, const Shape& shape) {
  STD_TORCH_CHECK(shape.dims <= kMaxDims, "feedback has ", shape.dims, " dimensions; expected at most ", kMaxDims);
  StepLayout layout{shape.dims, {}, {}};
  std::copy_n(shape.size, shape.dims, layout.size);
  for (int k = 0; k < kStepOperands; ++k) {
    if (operands[k] != nullptr) std::copy_n(shape_of(operands[k]).stride, shape.dims, layout.stride[k]);
  }
  return layout;
}

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

Dtype dtype_of(AtenTensorHandle tensor) {
  static const std::array<int32_t, 4> codes = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(),
                                               aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &code));
  const auto found = std::find(codes.begin(), codes.end(), code);
  STD_TORCH_CHECK(found != codes.end(), "expected float64, float32, bfloat16 or float16");
  return static_cast<Dtype>(found - codes.begin());
}

TensorList::TensorList(StableListHandle list) : list_(list) {
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list_, &size));
  handles_.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list_, i, &item));
    handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(item));
  }
}

TensorList::~TensorList() {
  for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  torch_delete_list(list_);
}

StepPlan plan_step(const StepArguments& a) {
  check_lengths(a);
  StepPlan plan;
  if (a.feedback.size() == 0) return plan;
  plan.tensors.reserve(a.feedback.size());
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

    for (AtenTensorHandle operand : operands) {
      STD_TORCH_CHECK(operand == nullptr || device_of(operand) == device, "tensor ", i,
                      " of feedback, weight, grad or momentum_buffer is not on the device of feedback 0");
    }

    StepTensor tensor{};
    tensor.dtype = dtype_of(a.feedback[i]);
    bool alike = shape.contiguous || (shape.dims <= kMaxDims && is_dense(shape.dims, shape.size, shape.stride));
    for (int k = 1; k < kStepOperands; ++k) {
      if (operands[k] == nullptr) continue;
      const Shape other = shape_of(operands[k]);
      STD_TORCH_CHECK(other.dims == shape.dims && std::equal(shape.size, shape.size + shape.dims, other.size) &&
                          dtype_of(operands[k]) == tensor.dtype,
                      "weight, grad or momentum_buffer ", i, " differs from feedback ", i, " in shape or dtype");
      alike = alike && (shape.contiguous ? other.contiguous : same_strides(shape, other));
    }
    // Noise is drawn in row-major order whatever the layout, so a noisy tensor in another one is walked too.
    tensor.layout = -1;
    if (!alike || (a.options.noise != 0 && !shape.contiguous)) {
      tensor.layout = static_cast<int32_t>(plan.layouts.size());
      plan.layouts.push_back(strided_layout(operands, shape));
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
    plan.tensors.push_back(tensor);
  }
  return plan;
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
