// Checks the arguments of extension_alignment_products and turns them into pairs.
#include "plans.h"

namespace pyfeedback {

AlignmentPlan plan_alignment(const TensorList& feedback, const TensorList& weight) {
  STD_TORCH_CHECK(feedback.size() == weight.size(), "feedback has ", feedback.size(), " tensors and weight has ",
                  weight.size(), "; expected the same number");
  AlignmentPlan plan;
  plan.rows.reserve(feedback.size());
  plan.device = device_of(feedback[0]);  // the dispatcher finds no device without a tensor
  constexpr const char* kNames = "feedback and weight";
  for (size_t i = 0; i < feedback.size(); ++i) {
    const std::array<View, 2> operands = {read_view(feedback[i], kNames), read_view(weight[i], kNames)};
    STD_TORCH_CHECK(operands[0].device == plan.device, "feedback[", i, "] is not on the device of feedback[0]");
    const bool alike = check_alike(operands, kNames, i);
    const int64_t numel = operands[0].shape.numel;
    if (numel == 0) continue;
    AlignmentPair pair{operands[0].data, operands[1].data, numel, static_cast<int32_t>(i), -1, operands[0].dtype};
    if (!alike) {
      pair.layout = static_cast<int32_t>(plan.layouts.size());
      plan.layouts.push_back(strided_layout(operands, kNames));
    }
    plan.rows.push_back(pair);
  }
  return plan;
}

}  // namespace pyfeedback
