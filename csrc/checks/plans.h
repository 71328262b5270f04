// Turns the arguments of an op into the operands of its kernels. Python raises the errors for the user; the checks here
// keep memory safe for every caller.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../alignment.h"
#include "../center.h"
#include "../depthwise.h"
#include "../probes.h"
#include "../step.h"
#include "tensors.h"

namespace pyfeedback {

// The rows of an element-wise op, without those of empty tensors.
template <typename Row>
struct Plan {
  std::vector<Row> rows;
  std::vector<RowLayout<Row>> layouts;  // Row::layout is an index into these
  Device device{};                      // of all rows

  const RowLayout<Row>* layout(const Row& row) const { return row.layout < 0 ? nullptr : &layouts[row.layout]; }
};

// The tensors and coefficients of a step. A coefficient has one value for all rows or one for each.
template <typename Row>
struct StepArguments {
  std::array<TensorList, Row::kOperands> lists;  // in the order of StepOperand
  const std::vector<double>&decay, &self, &tie;
};

using FeedbackPlan = Plan<FeedbackRow>;

// Checks options.dynamic by the tensor that it points into.
FeedbackPlan plan_feedback_step(const StepArguments<FeedbackRow>& arguments, const FeedbackOptions& options,
                                const std::optional<Tensor>& dynamic);

struct AdamWPlan : Plan<AdamWRow> {
  std::vector<float*> steps;  // the number of steps that each tensor has taken before this one
};

AdamWPlan plan_adamw_step(const StepArguments<AdamWRow>& arguments, const AdamWOptions& options,
                          const TensorList& steps, const std::vector<double>& weight_decay);

using AlignmentPlan = Plan<AlignmentPair>;

AlignmentPlan plan_alignment(const TensorList& feedback, const TensorList& weight);

struct CenterPlan {
  CenterOperands operands;
  Tensor output;  // uninitialized, strided like the input except that its samples are adjacent
};

CenterPlan plan_center(const Tensor& input, int64_t samples);

// Raises if the two differ in shape, dtype, device or the strides within a sample, or if the samples of self are not
// adjacent.
CenterOperands plan_add_centered(const Tensor& self, const Tensor& input);

struct DepthwiseArguments {
  const Tensor &grad_output, &input, &weight, &feedback;
  const std::optional<Tensor>&mean, &response, &response_mean;
  const std::vector<int64_t>&stride, &padding, &dilation;
  int64_t groups;
  const std::vector<double>& coefficients;  // decay, amp, null, sparse, self, tie
  int64_t samples;
  std::array<bool, 4> mask;  // of the gradients
};

// With respect to input, weight, feedback and bias. Those not asked for are empty.
using DepthwiseGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct DepthwisePlan {
  DepthwiseLayer layer;
  DepthwiseGradients gradients;  // uninitialized; the layer points into them
};

DepthwisePlan plan_depthwise(const DepthwiseArguments& arguments);

// The kernel transforms vectors of up to eight elements, and two of them at once if the basis has Paley's factor.
constexpr int64_t kLeastBasis = 8, kLeastBlock = 16;

struct ProbeArguments {
  const Tensor &weight, &feedback, &signs, &rows, &paley;
  const std::vector<double>& coefficients;  // decay, self, of_feedback, of_weight, scale
  bool need_response;
};

struct ProbePlan {
  ProbeOperands operands;
  Tensor gradient, response;  // uninitialized; the operands point into them
};

ProbePlan plan_probes(const ProbeArguments& arguments);

}  // namespace pyfeedback
