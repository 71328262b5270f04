// Checks the arguments of extension_depthwise_backward, turns them into a layer and allocates the gradients.
#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "plans.h"

namespace pyfeedback {

namespace {

// The sizes and strides [N, channels, rows, columns] of an activation or a kernel. Those of a linear layer, [N, C] or
// [N, positions, C], have one row.
struct Image {
  std::array<int64_t, 4> size, stride;
};

Image image_of(const Shape& shape) {
  const int64_t *size = shape.size, *stride = shape.stride;
  switch (shape.dims) {
    case 4:
      return {{size[0], size[1], size[2], size[3]}, {stride[0], stride[1], stride[2], stride[3]}};
    case 3:
      return {{size[0], size[2], 1, size[1]}, {stride[0], stride[2], 0, stride[1]}};
    case 2:
      return {{size[0], size[1], 1, 1}, {stride[0], stride[1], 0, 0}};
    default:
      STD_TORCH_CHECK(false, "a tensor has ", shape.dims, " dimensions; expected 2 to 4");
  }
}

FeatureMap map_of(const View& view) {
  const auto stride = image_of(view.shape).stride;
  return {view.data, stride[0], stride[1], stride[2], stride[3]};
}

// A view of an operand that has this size and dtype and is on the device of `like`.
View checked_view(const Tensor& tensor, const char* name, const std::array<int64_t, 4>& size, Dtype dtype,
                  const Tensor& like) {
  const View view = read_view(tensor.get(), name);
  STD_TORCH_CHECK(image_of(view.shape).size == size, name, " has the wrong shape; expected (", size[0], ", ", size[1],
                  ", ", size[2], ", ", size[3], ")");
  STD_TORCH_CHECK(view.dtype == dtype && view.device == device_of(like.get()), name,
                  " has the wrong dtype or device; expected those of input, or float32 for the mean of a 16-bit input");
  return view;
}

}  // namespace

DepthwisePlan plan_depthwise(const DepthwiseArguments& arguments) {
  const auto& [grad_output, input, weight, feedback, mean, response, response_mean, stride, padding, dilation, groups,
               coefficients, samples, mask] = arguments;
  const View x_view = read_view(input.get(), "input");
  const Shape &x_shape = x_view.shape, w_shape = shape_of(weight.get());
  STD_TORCH_CHECK(w_shape.dims == (x_shape.dims == 4 ? 4 : 2), "input and weight have ", x_shape.dims, " and ",
                  w_shape.dims, " dimensions; expected 4, or 2 or 3 and 2");
  const Image x = image_of(x_shape), w = image_of(w_shape);
  STD_TORCH_CHECK(groups > 0 && x.size[1] == groups * w.size[1] && w.size[0] % groups == 0, "groups is ", groups,
                  "; expected a divisor of the channels that fits weight");
  STD_TORCH_CHECK(coefficients.size() == 6, "coefficients has ", coefficients.size(), " values; expected 6");
  STD_TORCH_CHECK(samples > 0 && samples <= x.size[0], "samples is ", samples, "; expected 1 to ", x.size[0]);
  DepthwisePlan plan{};
  DepthwiseLayer& layer = plan.layer;
  layer.N = x.size[0], layer.G = groups, layer.I = w.size[1], layer.J = w.size[0] / groups;
  layer.H = x.size[2], layer.W = x.size[3], layer.R = w.size[2], layer.S = w.size[3];
  const int64_t map[] = {layer.H, layer.W}, kernel[] = {layer.R, layer.S};
  int64_t* const out[] = {&layer.P, &layer.Q};
  for (int d = 0; d < 2; ++d) {
    layer.stride[d] = stride.at(d), layer.padding[d] = padding.at(d), layer.dilation[d] = dilation.at(d);
    STD_TORCH_CHECK(layer.stride[d] > 0 && layer.padding[d] >= 0 && layer.dilation[d] > 0,
                    "stride and dilation must be positive, and padding must not be negative");
    const int64_t span = map[d] + 2 * layer.padding[d] - layer.dilation[d] * (kernel[d] - 1) - 1;
    STD_TORCH_CHECK(span >= 0, "the kernel is larger than the padded input");
    *out[d] = span / layer.stride[d] + 1;
  }
  layer.samples = samples;
  layer.dtype = x_view.dtype;
  const std::array<int64_t, 4> out_size = {layer.N, w.size[0], layer.P, layer.Q},
                               kernel_size = {w.size[0], layer.I, layer.R, layer.S};
  const View dy = checked_view(grad_output, "grad_output", out_size, layer.dtype, input);
  const View weight_view = checked_view(weight, "weight", kernel_size, layer.dtype, input);
  const View feedback_view = checked_view(feedback, "feedback", kernel_size, layer.dtype, input);
  STD_TORCH_CHECK(w_shape.contiguous && feedback_view.shape.contiguous, "weight or feedback is not contiguous");
  STD_TORCH_CHECK(is_dense(x_shape.dims, x_shape.size, x_shape.stride), "input is not dense");
  layer.input = map_of(x_view);
  layer.grad_output = map_of(dy);
  layer.weight = weight_view.data;
  layer.feedback = feedback_view.data;
  const Dtype acc = layer.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  if (mean) layer.mean = map_of(checked_view(*mean, "mean", {1, x.size[1], layer.H, layer.W}, acc, input));
  if (response) layer.response = map_of(checked_view(*response, "response", out_size, layer.dtype, input));
  if (response_mean) {
    layer.response_mean =
        map_of(checked_view(*response_mean, "response_mean", {1, w.size[0], layer.P, layer.Q}, acc, input));
  }
  layer.decay = coefficients[0], layer.amp = coefficients[1], layer.null = coefficients[2];
  layer.sparse = coefficients[3], layer.self = coefficients[4], layer.tie = coefficients[5];

  using torch::stable::empty_like, torch::stable::new_empty;
  auto& [grad_input, grad_weight, grad_feedback, grad_bias] = plan.gradients;
  grad_input = mask[0] ? empty_like(input) : new_empty(input, {0});
  grad_weight = mask[1] ? empty_like(weight) : new_empty(input, {0});
  grad_feedback = mask[2] ? empty_like(weight) : new_empty(input, {0});
  grad_bias = new_empty(input, {mask[3] ? w.size[0] : 0});
  if (mask[0]) layer.grad_input = map_of(write_view(grad_input.get(), "grad_input"));
  if (mask[1]) layer.grad_weight = grad_weight.mutable_data_ptr();
  if (mask[2]) layer.grad_feedback = grad_feedback.mutable_data_ptr();
  if (mask[3]) layer.grad_bias = grad_bias.mutable_data_ptr();
  if (!mask[2]) layer.decay = layer.amp = layer.null = layer.sparse = layer.self = layer.tie = 0;
  return plan;
}

}  // namespace pyfeedback
