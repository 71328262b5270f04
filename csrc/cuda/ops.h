// The CUDA implementations of the native ops, as the registration rows take them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "../arguments.h"

namespace pyfeedback::cuda {

torch::stable::Tensor alignment_products(StableListHandle feedback, StableListHandle weight);

torch::stable::Tensor center(const torch::stable::Tensor& input, int64_t samples);

void feedback_step_(StableListHandle feedback, StableListHandle weight, StableListHandle grad,
                    StableListHandle momentum_buffer, const std::vector<double>& decay, const std::vector<double>& self,
                    const std::vector<double>& tie, double lr, double momentum, bool nesterov, double noise,
                    int64_t seed, bool skip_nonfinite, const std::optional<torch::stable::Tensor>& dynamic);

}  // namespace pyfeedback::cuda
