// Divides the steps among threads; the kernels are in step_kernels.h.
#include <atomic>

#include "chunks.h"
#include "kernels.h"

namespace pyfeedback::cpu {

void Backend::feedback_step(const FeedbackPlan& plan, const FeedbackOptions& options) const {
  const Kernels& kernel = kernels();
  if (options.skip_nonfinite) {
    std::atomic<bool> found{false};
    for_each_chunk(plan, [&](const FeedbackRow& row, const auto* layout, int64_t begin, int64_t end) {
      if (!found.load(std::memory_order_relaxed) && kernel.any_nonfinite(row, layout, begin, end)) {
        found.store(true, std::memory_order_relaxed);
      }
    });
    if (found) return;
  }
  for_each_chunk(plan, [&](const FeedbackRow& row, const auto* layout, int64_t begin, int64_t end) {
    kernel.feedback_step(row, layout, options, begin, end);
  });
}

void Backend::adamw_step(const AdamWPlan& plan, const AdamWOptions& options) const {
  const Kernels& kernel = kernels();
  for_each_chunk(plan, [&](const AdamWRow& row, const auto* layout, int64_t begin, int64_t end) {
    kernel.adamw_step(row, layout, options, begin, end);
  });
}

}  // namespace pyfeedback::cpu
