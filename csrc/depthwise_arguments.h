// Unpacks and checks the arguments of native_depthwise_backward, on any device.
#pragma once

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "depthwise.h"

namespace pyfeedback {

// Of input, weight, feedback and bias; those not asked for are empty.
using DepthwiseGradients =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

struct DepthwiseWindow {
  const std::vector<int64_t>&stride, &padding, &dilation;
  int64_t groups;
};

// What the kernels of CUDA read beside the operands; the mean is read on CPUs too.
struct DepthwiseOptional {
  const std::optional<torch::stable::Tensor>&mean, &response, &response_mean;
};

// The layer as the kernels see it, and the gradients that it points into, not yet written.
struct DepthwiseCall {
  DepthwiseLayer layer;
  DepthwiseGradients gradients;
};

// coefficients: decay, amp, null, sparse, self, tie. mask: of input, weight, feedback and bias.
DepthwiseCall plan_depthwise(const torch::stable::Tensor& grad_output, const torch::stable::Tensor& input,
                             const torch::stable::Tensor& weight, const torch::stable::Tensor& feedback,
                             const DepthwiseOptional& optional, const DepthwiseWindow& window,
                             const std::vector<double>& coefficients, int64_t samples, const std::array<bool, 4>& mask);

}  // namespace pyfeedback
