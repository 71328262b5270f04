#include <atomic>

#include "kernels.h"
#include "ops.h"
#include "stretches.h"

namespace pyfeedback::cpu {

void feedback_step_(StableListHandle feedback, StableListHandle weight, StableListHandle grad,
                    StableListHandle momentum_buffer, const std::vector<double>& decay, const std::vector<double>& self,
                    const std::vector<double>& tie, double lr, double momentum, bool nesterov, double noise,
                    int64_t seed, bool skip_nonfinite, const std::optional<torch::stable::Tensor>& dynamic) {
  const StepArguments arguments{TensorList(feedback),
                                TensorList(weight),
                                TensorList(grad),
                                TensorList(momentum_buffer),
                                decay,
                                self,
                                tie,
                                dynamic,
                                step_options(lr, momentum, nesterov, noise, seed, dynamic)};
  const StepPlan plan = plan_step(arguments);
  const Kernels& kernel = kernels();
  if (skip_nonfinite) {
    std::atomic<bool> found{false};
    for_each_stretch(plan, [&](const StepTensor& tensor, const StepLayout* layout, int64_t begin, int64_t end) {
      if (!found.load(std::memory_order_relaxed) && kernel.any_nonfinite(tensor, layout, begin, end)) {
        found.store(true, std::memory_order_relaxed);
      }
    });
    if (found) return;
  }
  for_each_stretch(plan, [&](const StepTensor& tensor, const StepLayout* layout, int64_t begin, int64_t end) {
    kernel.step(tensor, layout, arguments.options, begin, end);
  });
}

}  // namespace pyfeedback::cpu
