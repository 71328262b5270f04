// The CPU library: what is registered for the schemas in pyfeedback/schemas.py. Signatures must match them word for
// word, for a boxed kernel that contradicts its schema registers all the same and returns wrong values.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(pyfeedback, CPU, m) {
  m.impl("native_adamw_step_", TORCH_BOX(&pyfeedback::cpu::adamw_step_));
  m.impl("native_add_centered_", TORCH_BOX(&pyfeedback::cpu::add_centered_));
  m.impl("native_alignment_products", TORCH_BOX(&pyfeedback::cpu::alignment_products));
  m.impl("native_center", TORCH_BOX(&pyfeedback::cpu::center));
  m.impl("native_depthwise_backward", TORCH_BOX(&pyfeedback::cpu::depthwise_backward));
  m.impl("native_feedback_step_", TORCH_BOX(&pyfeedback::cpu::feedback_step_));
}
