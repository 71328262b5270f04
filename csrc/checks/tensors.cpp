// Reads the properties of tensors and compares those of several tensors.
#include "tensors.h"

namespace pyfeedback {

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

bool is_dense(int64_t dims, const int64_t* size, const int64_t* stride) {
  std::array<bool, kMaxDims> counted{};
  int64_t block = 1;
  for (int64_t round = 0; round < dims; ++round) {
    for (int64_t d = 0; d < dims; ++d) {
      if (counted[d] || (size[d] != 1 && stride[d] != block)) continue;
      counted[d] = true;
      block *= size[d];
    }
  }
  return std::all_of(counted.begin(), counted.begin() + dims, [](bool is_counted) { return is_counted; });
}

bool same_strides(const Shape& a, const Shape& b) {
  for (int64_t d = 0; d < a.dims; ++d) {
    if (a.size[d] != 1 && a.stride[d] != b.stride[d]) return false;
  }
  return true;
}

Device device_of(AtenTensorHandle tensor) {
  Device device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &device.index));
  return device;
}

Tensor empty(int64_t dims, const int64_t* size, const int64_t* stride, int32_t dtype, const Device& device) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, size, stride, dtype, device.type, device.index, &handle));
  return Tensor(handle);
}

namespace {

// The number of elements from the first one in memory to the last one.
int64_t extent_of(const Shape& shape) {
  if (shape.contiguous || shape.numel == 0) return shape.numel;
  int64_t extent = 1;
  for (int64_t d = 0; d < shape.dims; ++d) extent += (shape.size[d] - 1) * shape.stride[d];
  return extent;
}

// Raises if the storage does not hold these bytes.
int64_t held_bytes(AtenTensorHandle tensor, const Shape& shape, int64_t element, const char* name) {
  const int64_t bytes = extent_of(shape) * element;
  int64_t held, offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor, &held));
  if (held == bytes) return bytes;  // the offset can only be zero
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor, &offset));
  STD_TORCH_CHECK(bytes == 0 || offset * element + bytes <= held, name, " has storage of ", held, " bytes; expected ",
                  offset * element + bytes);
  return bytes;
}

View view_of(AtenTensorHandle tensor, const char* name) {
  View view{tensor, nullptr, 0, shape_of(tensor), device_of(tensor), dtype_of(tensor)};
  view.bytes = held_bytes(tensor, view.shape, element_size(view.dtype), name);
  return view;
}

}  // namespace

View read_view(AtenTensorHandle tensor, const char* name) {
  View view = view_of(tensor, name);
  const void* data;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &data));
  view.data = const_cast<void*>(data);
  return view;
}

View write_view(AtenTensorHandle tensor, const char* name) {
  View view = view_of(tensor, name);
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &view.data));
  return view;
}

bool same_view(const View& a, const View& b) {
  return a.tensor && b.tensor && a.data == b.data && a.dtype == b.dtype && a.shape.dims == b.shape.dims &&
         std::equal(a.shape.size, a.shape.size + a.shape.dims, b.shape.size) && same_strides(a.shape, b.shape);
}

}  // namespace pyfeedback
