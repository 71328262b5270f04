// The signature of every compiled op, once for all devices. An op checks its arguments, plans the work of the kernels
// (checks/plans.h), and then calls its backend: cpu::Backend (cpu/backend.h) or cuda::Backend (cuda/backend.h).
//
// A signature must match its schema in pyfeedback/ops/schemas.py exactly: a boxed kernel that contradicts its schema
// registers without an error and returns wrong values.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks/plans.h"

namespace pyfeedback {

template <typename Backend>
void feedback_step_(StableListHandle feedback, StableListHandle weight, StableListHandle grad,
                    StableListHandle momentum_buffer, const std::vector<double>& decay, const std::vector<double>& self,
                    const std::vector<double>& tie, double lr, double momentum, bool nesterov, double noise,
                    int64_t seed, bool skip_nonfinite, const std::optional<Tensor>& dynamic) {
  const StepArguments<FeedbackRow> arguments{
      {TensorList(feedback), TensorList(weight), TensorList(grad), TensorList(momentum_buffer)}, decay, self, tie};
  const void* factors = dynamic ? dynamic->const_data_ptr() : nullptr;
  const FeedbackOptions options{
      lr, momentum, noise, static_cast<uint64_t>(seed), nesterov, skip_nonfinite, static_cast<const double*>(factors)};
  const FeedbackPlan plan = plan_feedback_step(arguments, options, dynamic);
  if (!plan.rows.empty()) Backend(plan.device).feedback_step(plan, options);
}

// For CPUs only: there is no CUDA kernel.
template <typename Backend>
void adamw_step_(StableListHandle param, StableListHandle weight, StableListHandle grad, StableListHandle exp_avg,
                 StableListHandle exp_avg_sq, StableListHandle step, const std::vector<double>& decay,
                 const std::vector<double>& self, const std::vector<double>& tie,
                 const std::vector<double>& weight_decay, double lr, double beta1, double beta2, double eps) {
  const StepArguments<AdamWRow> arguments{
      {TensorList(param), TensorList(weight), TensorList(grad), TensorList(exp_avg), TensorList(exp_avg_sq)},
      decay,
      self,
      tie};
  const TensorList steps(step);
  const AdamWOptions options{lr, beta1, beta2, eps};
  const AdamWPlan plan = plan_adamw_step(arguments, options, steps, weight_decay);
  for (float* count : plan.steps) ++*count;
  if (!plan.rows.empty()) Backend(plan.device).adamw_step(plan, options);
}

template <typename Backend>
Tensor alignment_products(StableListHandle feedback, StableListHandle weight) {
  const TensorList feedbacks(feedback), weights(weight);
  const AlignmentPlan plan = plan_alignment(feedbacks, weights);
  const int64_t size[] = {static_cast<int64_t>(feedbacks.size()), kProducts}, stride[] = {kProducts, 1};
  Tensor products = empty(2, size, stride, aoti_torch_dtype_float64(), plan.device);
  torch::stable::zero_(products);
  if (!plan.rows.empty()) Backend(plan.device).alignment_products(plan, products);
  return products;
}

template <typename Backend>
Tensor center(const Tensor& input, int64_t samples) {
  const CenterPlan plan = plan_center(input, samples);
  if (!plan.operands.is_empty()) Backend(device_of(input.get())).center(plan.operands);
  return plan.output;
}

template <typename Backend>
void add_centered_(const Tensor& self, const Tensor& input, double beta, double alpha) {
  const CenterOperands operands = plan_add_centered(self, input);
  if (!operands.is_empty()) Backend(device_of(input.get())).add_centered(operands, beta, alpha);
}

template <typename Backend>
DepthwiseGradients depthwise_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                      const Tensor& feedback, const std::optional<Tensor>& mean,
                                      const std::optional<Tensor>& response, const std::optional<Tensor>& response_mean,
                                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                      const std::vector<int64_t>& dilation, int64_t groups,
                                      const std::vector<double>& coefficients, int64_t samples, bool need_input,
                                      bool need_weight, bool need_feedback, bool need_bias) {
  const std::array<bool, 4> mask = {need_input, need_weight, need_feedback, need_bias};
  const DepthwisePlan plan = plan_depthwise({grad_output, input, weight, feedback, mean, response, response_mean,
                                             stride, padding, dilation, groups, coefficients, samples, mask});
  Backend(device_of(input.get())).depthwise_backward(plan.layer);
  return plan.gradients;
}

// For CPUs only: there is no CUDA kernel.
template <typename Backend>
DepthwiseGradients dense_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                  const Tensor& feedback, const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                  const std::vector<double>& coefficients, bool center, int64_t samples,
                                  bool need_input, bool need_weight, bool need_feedback, bool need_bias) {
  const std::array<bool, 4> mask = {need_input, need_weight, need_feedback, need_bias};
  const std::optional<Tensor> none;
  const DepthwisePlan plan = plan_depthwise({grad_output, input, weight, feedback, none, none, none, stride, padding,
                                             dilation, 1, coefficients, samples, mask});
  Backend(device_of(input.get())).dense_backward(plan.layer, center);
  return plan.gradients;
}

// For CPUs only: there is no CUDA kernel.
template <typename Backend>
std::tuple<Tensor, Tensor> probe_gradients(const Tensor& weight, const Tensor& feedback, const Tensor& signs,
                                           const Tensor& rows, const Tensor& paley,
                                           const std::vector<double>& coefficients, bool need_response) {
  const ProbePlan plan = plan_probes({weight, feedback, signs, rows, paley, coefficients, need_response});
  Backend(device_of(weight.get())).probe_gradients(plan.operands);
  return {plan.gradient, plan.response};
}

// Registers the ops that all devices have.
template <typename Backend, typename Library>
void register_ops(Library& library) {
  library.impl("extension_add_centered_", TORCH_BOX(&add_centered_<Backend>));
  library.impl("extension_alignment_products", TORCH_BOX(&alignment_products<Backend>));
  library.impl("extension_center", TORCH_BOX(&center<Backend>));
  library.impl("extension_depthwise_backward", TORCH_BOX(&depthwise_backward<Backend>));
  library.impl("extension_feedback_step_", TORCH_BOX(&feedback_step_<Backend>));
}

}  // namespace pyfeedback
