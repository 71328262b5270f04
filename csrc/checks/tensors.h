// Properties of tensors, read by the stable ABI, and checks of several tensors of one shape.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "../dtype.h"
#include "../layout.h"

namespace pyfeedback {

using torch::stable::Tensor;

Dtype dtype_of(AtenTensorHandle tensor);

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

Device device_of(AtenTensorHandle tensor);

// Sizes and strides are borrowed from the tensor.
struct Shape {
  int64_t dims;
  int64_t numel;
  const int64_t* size;
  const int64_t* stride;
  bool contiguous;
};

Shape shape_of(AtenTensorHandle tensor);

// Whether the dimensions, in some order, fill one block without gaps. `dims` is at most kMaxDims.
bool is_dense(int64_t dims, const int64_t* size, const int64_t* stride);

bool same_strides(const Shape& a, const Shape& b);

// Uninitialized. `dtype` is a code of the stable ABI, such as aoti_torch_dtype_float64().
Tensor empty(int64_t dims, const int64_t* size, const int64_t* stride, int32_t dtype, const Device& device);

// Owns the tensors of a `Tensor[]` argument. std::vector<Tensor> would allocate a shared_ptr for every handle, which is
// a third of the cost of a step over many small tensors.
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

// Everything that the checks need to know about one operand. `tensor` is null if there is no operand.
struct View {
  AtenTensorHandle tensor = nullptr;
  void* data = nullptr;
  int64_t bytes = 0;  // from the first element in memory to the end of the last one
  Shape shape{};
  Device device{};
  Dtype dtype{};
};

// Raise an error that names the tensor if its storage is too small: FSDP frees the storage of parameters. A write view
// makes the data writable first, as a copy-on-write tensor requires.
View read_view(AtenTensorHandle tensor, const char* name);
View write_view(AtenTensorHandle tensor, const char* name);

// Whether both exist and are the same elements in the same order.
bool same_view(const View& a, const View& b);

// Whether element i of every operand is at offset i. Raises if an operand differs from the first one in device, shape
// or dtype. `names` are those of all operands and `index` is their index in the lists of the op.
template <size_t kOperands>
bool check_alike(const std::array<View, kOperands>& operands, const char* names, size_t index) {
  const Shape& shape = operands[0].shape;
  bool alike = shape.contiguous || (shape.dims <= kMaxDims && is_dense(shape.dims, shape.size, shape.stride));
  for (size_t k = 1; k < kOperands; ++k) {
    if (operands[k].tensor == nullptr) continue;
    const Shape& other = operands[k].shape;
    STD_TORCH_CHECK(operands[k].device == operands[0].device && operands[k].dtype == operands[0].dtype &&
                        other.dims == shape.dims && std::equal(shape.size, shape.size + shape.dims, other.size),
                    names, "[", index, "] differ in device, shape or dtype");
    alike = alike && (shape.contiguous ? other.contiguous : same_strides(shape, other));
  }
  return alike;
}

template <size_t kOperands>
Layout<kOperands> strided_layout(const std::array<View, kOperands>& operands, const char* names) {
  const Shape& shape = operands[0].shape;
  STD_TORCH_CHECK(shape.dims <= kMaxDims, names, " have ", shape.dims, " dimensions; expected at most ", kMaxDims,
                  " unless all have the same dense strides");
  Layout<kOperands> layout{shape.dims, {}, {}};
  std::copy_n(shape.size, shape.dims, layout.size);
  for (size_t k = 0; k < kOperands; ++k) {
    if (operands[k].tensor) std::copy_n(operands[k].shape.stride, shape.dims, layout.stride[k]);
  }
  return layout;
}

}  // namespace pyfeedback
