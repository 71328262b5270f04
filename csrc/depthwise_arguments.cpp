#include "depthwise_arguments.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace pyfeedback {

namespace {

using torch::stable::Tensor;

Map map_of(const Tensor& tensor, const char* name) {
  const View view = read_view(tensor.get(), name);
  const int64_t* stride = view.shape.stride;
  return {view.data, stride[0], stride[1], stride[2], stride[3]};
}

void check_size(const Tensor& tensor, const char* name, const std::array<int64_t, 4>& size) {
  const Shape shape = shape_of(tensor.get());
  STD_TORCH_CHECK(shape.dims == 4 && std::equal(size.begin(), size.end(), shape.size), name,
                  " has another shape than the layer asks for: ", size[0], ", ", size[1], ", ", size[2], ", ", size[3]);
}

void check_shape(const Tensor& tensor, const char* name, const std::array<int64_t, 4>& size, const Tensor& like) {
  check_size(tensor, name, size);
  STD_TORCH_CHECK(dtype_of(tensor.get()) == dtype_of(like.get()) && device_of(tensor.get()) == device_of(like.get()),
                  name, " differs from input in dtype or device");
}

// In the type of the arithmetic.
Map map_of_mean(const Tensor& tensor, const char* name, const std::array<int64_t, 4>& size, const Tensor& like) {
  check_size(tensor, name, size);
  const Dtype wide = dtype_of(like.get()) == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  STD_TORCH_CHECK(dtype_of(tensor.get()) == wide && device_of(tensor.get()) == device_of(like.get()), name,
                  " is expected on the device of input and in float32, or float64 where input is");
  return map_of(tensor, name);
}

}  // namespace

DepthwiseCall plan_depthwise(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                             const Tensor& feedback, const DepthwiseOptional& optional, const DepthwiseWindow& window,
                             const std::vector<double>& coefficients, int64_t samples,
                             const std::array<bool, 4>& mask) {
  const Shape x = shape_of(input.get()), w = shape_of(weight.get());
  const int64_t groups = window.groups;
  STD_TORCH_CHECK(x.dims == 4 && w.dims == 4, "input and weight have ", x.dims, " and ", w.dims,
                  " dimensions; expected 4");
  STD_TORCH_CHECK(groups > 0 && x.size[1] == groups * w.size[1] && w.size[0] % groups == 0, "groups is ", groups,
                  "; expected a divisor of the channels that fits weight");
  STD_TORCH_CHECK(coefficients.size() == 6, "coefficients has ", coefficients.size(), " values; expected 6");
  STD_TORCH_CHECK(samples > 0 && samples <= x.size[0], "samples is ", samples, "; expected 1 to ", x.size[0]);
  DepthwiseCall call{};
  DepthwiseLayer& a = call.layer;
  a.N = x.size[0], a.G = groups, a.I = w.size[1], a.J = w.size[0] / groups;
  a.H = x.size[2], a.W = x.size[3], a.R = w.size[2], a.S = w.size[3];
  const int64_t map[] = {a.H, a.W}, kernel[] = {a.R, a.S};
  int64_t* const out[] = {&a.P, &a.Q};
  for (int d = 0; d < 2; ++d) {
    a.stride[d] = window.stride.at(d), a.padding[d] = window.padding.at(d), a.dilation[d] = window.dilation.at(d);
    STD_TORCH_CHECK(a.stride[d] > 0 && a.padding[d] >= 0 && a.dilation[d] > 0,
                    "stride, padding or dilation is negative, or no step at all");
    const int64_t room = map[d] + 2 * a.padding[d] - a.dilation[d] * (kernel[d] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "the kernel is larger than the padded input");
    *out[d] = room / a.stride[d] + 1;
  }
  a.samples = samples;
  a.dtype = dtype_of(input.get());
  check_shape(grad_output, "grad_output", {a.N, w.size[0], a.P, a.Q}, input);
  check_shape(weight, "weight", {w.size[0], a.I, a.R, a.S}, input);
  check_shape(feedback, "feedback", {w.size[0], a.I, a.R, a.S}, input);
  STD_TORCH_CHECK(w.contiguous && shape_of(feedback.get()).contiguous, "expected weight and feedback contiguous");
  STD_TORCH_CHECK(is_dense(4, x.size, x.stride), "expected input dense");
  a.input = map_of(input, "input");
  a.grad_output = map_of(grad_output, "grad_output");
  if (optional.response) {
    check_shape(*optional.response, "response", {a.N, w.size[0], a.P, a.Q}, input);
    a.response = map_of(*optional.response, "response");
  }
  if (optional.mean) a.mean = map_of_mean(*optional.mean, "mean", {1, x.size[1], a.H, a.W}, input);
  if (optional.response_mean) {
    a.response_mean = map_of_mean(*optional.response_mean, "response_mean", {1, w.size[0], a.P, a.Q}, input);
  }
  a.weight = read_pointer(weight.get(), "weight");
  a.feedback = read_pointer(feedback.get(), "feedback");
  a.decay = coefficients[0], a.amp = coefficients[1], a.null = coefficients[2];
  a.sparse = coefficients[3], a.self = coefficients[4], a.tie = coefficients[5];

  using torch::stable::empty_like, torch::stable::new_empty;
  auto& [grad_input, grad_weight, grad_feedback, grad_bias] = call.gradients;
  grad_input = mask[0] ? empty_like(input) : new_empty(input, {0});
  grad_weight = mask[1] ? empty_like(weight) : new_empty(input, {0});
  grad_feedback = mask[2] ? empty_like(weight) : new_empty(input, {0});
  grad_bias = new_empty(input, {mask[3] ? w.size[0] : 0});
  if (mask[0]) a.grad_input = map_of(grad_input, "grad_input");
  if (mask[1]) a.grad_weight = write_pointer(grad_weight.get(), "grad_weight");
  if (mask[2]) a.grad_feedback = write_pointer(grad_feedback.get(), "grad_feedback");
  if (mask[3]) a.grad_bias = write_pointer(grad_bias.get(), "grad_bias");
  if (!mask[2]) a.decay = a.amp = a.null = a.sparse = a.self = a.tie = 0;
  return call;
}

}  // namespace pyfeedback
