// The CUDA implementations of the native ops, as the registration rows take them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "../arguments.h"
#include "../depthwise_arguments.h"

namespace pyfeedback::cuda {

torch::stable::Tensor alignment_products(StableListHandle feedback, StableListHandle weight);

torch::stable::Tensor center(const torch::stable::Tensor& input, int64_t samples);

void add_centered_(const torch::stable::Tensor& self, const torch::stable::Tensor& input, double beta, double alpha);

DepthwiseGradients depthwise_backward(const torch::stable::Tensor& grad_output, const torch::stable::Tensor& input,
                                      const torch::stable::Tensor& weight, const torch::stable::Tensor& feedback,
                                      const std::optional<torch::stable::Tensor>& mean,
                                      const std::optional<torch::stable::Tensor>& response,
                                      const std::optional<torch::stable::Tensor>& response_mean,
                                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                      const std::vector<int64_t>& dilation, int64_t groups,
                                      const std::vector<double>& coefficients, int64_t samples, bool need_input,
                                      bool need_weight, bool need_feedback, bool need_bias);

void feedback_step_(StableListHandle feedback, StableListHandle weight, StableListHandle grad,
                    StableListHandle momentum_buffer, const std::vector<double>& decay, const std::vector<double>& self,
                    const std::vector<double>& tie, double lr, double momentum, bool nesterov, double noise,
                    int64_t seed, bool skip_nonfinite, const std::optional<torch::stable::Tensor>& dynamic);

}  // namespace pyfeedback::cuda
