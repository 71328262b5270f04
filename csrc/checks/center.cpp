// Checks the arguments of extension_center and extension_add_centered_ and turns them into operands.
#include "plans.h"

namespace pyfeedback {

namespace {

// The operands except for the output.
CenterOperands operands_of(const View& input, int64_t samples) {
  const Shape& shape = input.shape;
  STD_TORCH_CHECK(shape.dims >= 1 && shape.dims <= kMaxDims, "input has ", shape.dims, " dimensions; expected 1 to ",
                  kMaxDims);
  STD_TORCH_CHECK(samples >= 0 && samples <= shape.size[0], "samples is ", samples, "; expected 0 to ", shape.size[0],
                  ", the samples of input");
  int64_t positions = 1;
  for (int64_t d = 1; d < shape.dims; ++d) positions *= shape.size[d];
  const bool dense = positions == 0 || is_dense(shape.dims - 1, shape.size + 1, shape.stride + 1);
  STD_TORCH_CHECK(dense && (samples <= 1 || shape.stride[0] >= positions),
                  "input has samples that are not dense or that overlap; expected contiguous or channels_last");
  return {input.data, nullptr, samples, positions, shape.stride[0], input.dtype};
}

}  // namespace

CenterPlan plan_center(const Tensor& input, int64_t samples) {
  const View view = read_view(input.get(), "input");
  CenterOperands operands = operands_of(view, samples);
  std::array<int64_t, kMaxDims> size, stride;
  std::copy_n(view.shape.size, view.shape.dims, size.begin());
  std::copy_n(view.shape.stride, view.shape.dims, stride.begin());
  size[0] = operands.samples;
  stride[0] = operands.positions;
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
  const Tensor output = empty(view.shape.dims, size.data(), stride.data(), dtype, view.device);
  operands.output = output.mutable_data_ptr();
  return {operands, output};
}

CenterOperands plan_add_centered(const Tensor& self, const Tensor& input) {
  const View read = read_view(input.get(), "input"), written = write_view(self.get(), "self");
  check_alike<2>({read, written}, "input and self", 0);
  CenterOperands operands = operands_of(read, read.shape.dims ? read.shape.size[0] : 0);
  operands.output = written.data;
  bool alike = operands.samples <= 1 || operands.positions == 0 || written.shape.stride[0] == operands.positions;
  for (int64_t d = 1; d < read.shape.dims; ++d) {
    alike = alike && (read.shape.size[d] == 1 || read.shape.stride[d] == written.shape.stride[d]);
  }
  STD_TORCH_CHECK(alike, "self has other strides than input or gaps between samples; expected neither");
  return operands;
}

}  // namespace pyfeedback
