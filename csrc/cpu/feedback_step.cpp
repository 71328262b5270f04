#include <algorithm>
#include <atomic>

#include <torch/csrc/stable/ops.h>

#include "kernels.h"
#include "ops.h"

namespace pyfeedback::cpu {

namespace {

// Runs visit(tensor, layout, begin, end) over the whole model, cut by element count and not by tensor.
template <typename Visitor>
void for_each_stretch(const StepPlan& plan, const Visitor& visit) {
  std::vector<int64_t> ends(plan.tensors.size());
  int64_t total = 0;
  for (size_t i = 0; i < ends.size(); ++i) ends[i] = total += plan.tensors[i].numel;
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
    for (; begin < end; ++i) {
      const StepTensor& tensor = plan.tensors[i];
      const int64_t first = ends[i] - tensor.numel, last = std::min(end, ends[i]);
      const StepLayout* layout = tensor.layout < 0 ? nullptr : &plan.layouts[tensor.layout];
      visit(tensor, layout, begin - first, last - first);
      begin = last;
    }
  });
}

}  // namespace

void feedback_step_(StableListHandle feedback, StableListHandle weight, StableListHandle grad,
                    StableListHandle momentum_buffer, const std::vector<double>& decay, const std::vector<double>& self,
                    const std::vector<double>& tie, double lr, double momentum, bool nesterov, double noise,
                    int64_t seed, bool skip_nonfinite) {
  const StepArguments arguments{TensorList(feedback),
                                TensorList(weight),
                                TensorList(grad),
                                TensorList(momentum_buffer),
                                decay,
                                self,
                                tie,
                                StepOptions{lr, momentum, noise, static_cast<uint64_t>(seed), nesterov}};
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
