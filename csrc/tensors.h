// What the stable ABI tells about a tensor, and whether several of one shape can be walked together.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "dtype.h"
#include "layout.h"

namespace pyfeedback {

Dtype dtype_of(AtenTensorHandle tensor);

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

Device device_of(AtenTensorHandle tensor);

// Sizes and strides borrowed from a tensor, and whether it is contiguous.
struct Shape {
  int64_t dims;
  int64_t numel;
  const int64_t* size;
  const int64_t* stride;
  bool contiguous;
};

Shape shape_of(AtenTensorHandle tensor);

// Elements from the first one in memory to the last one, both counted.
int64_t extent_of(const Shape& shape);

// Whether the dimensions, in some order, fill one block without holes. `dims` is at most kMaxDims.
bool is_dense(int64_t dims, const int64_t* size, const int64_t* stride);

bool same_strides(const Shape& a, const Shape& b);

// Where the first element is. Raises, by `name`, where the storage does not hold the tensor: that of a freed one is
// empty, as FSDP leaves those of parameters.
const void* read_pointer(AtenTensorHandle tensor, const char* name);
void* write_pointer(AtenTensorHandle tensor, const char* name);

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

// One operand of a row, looked at once; `tensor` is null where the row has no such operand.
struct View {
  AtenTensorHandle tensor = nullptr;
  void* data = nullptr;
  int64_t bytes = 0;  // from the first element in memory to the end of the last one
  Shape shape{};
  Device device{};
  Dtype dtype{};
};

// Raise as the pointers do.
View read_view(AtenTensorHandle tensor, const char* name);
View write_view(AtenTensorHandle tensor, const char* name);

// Whether both are there and are the same elements in the same order.
bool same_view(const View& a, const View& b);

// Whether element i of every operand that is there is at i. Raises where one of them differs from the first in device,
// shape or dtype: `names` are those of all, `index` is their place in the lists they came in.
template <size_t kOperands>
bool check_alike(const std::array<View, kOperands>& operands, const char* names, size_t index) {
  const Shape& shape = operands[0].shape;
  bool alike = shape.contiguous || (shape.dims <= kMaxDims && is_dense(shape.dims, shape.size, shape.stride));
  for (size_t k = 1; k < kOperands; ++k) {
    if (operands[k].tensor == nullptr) continue;
    const Shape& other = operands[k].shape;
    STD_TORCH_CHECK(operands[k].device == operands[0].device && operands[k].dtype == operands[0].dtype &&
                        other.dims == shape.dims && std::equal(shape.size, shape.size + shape.dims, other.size),
                    names, " ", index, " differ in device, shape or dtype");
    alike = alike && (shape.contiguous ? other.contiguous : same_strides(shape, other));
  }
  return alike;
}

// A strided walk over the operands that are there.
template <size_t kOperands>
Layout<kOperands> strided_layout(const std::array<View, kOperands>& operands, const char* names) {
  const Shape& shape = operands[0].shape;
  STD_TORCH_CHECK(shape.dims <= kMaxDims, names, " have ", shape.dims, " dimensions; expected at most ", kMaxDims,
                  " where they lie in memory in unlike ways");
  Layout<kOperands> layout{shape.dims, {}, {}};
  std::copy_n(shape.size, shape.dims, layout.size);
  for (size_t k = 0; k < kOperands; ++k) {
    if (operands[k].tensor) std::copy_n(operands[k].shape.stride, shape.dims, layout.stride[k]);
  }
  return layout;
}

// The rows of an element-wise op, empty ones left out, and the layouts that Row::layout points into: -1 where element i
// of every operand is at i.
template <typename Row, int kOperands>
struct Plan {
  std::vector<Row> rows;
  std::vector<Layout<kOperands>> layouts;

  const Layout<kOperands>* layout(const Row& row) const { return row.layout < 0 ? nullptr : &layouts[row.layout]; }
};

}  // namespace pyfeedback
