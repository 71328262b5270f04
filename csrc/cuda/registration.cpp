// The CUDA library: what is registered for the schemas in pyfeedback/schemas.py; see csrc/registration.cpp.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(pyfeedback, CUDA, m) {
  m.impl("native_add_centered_", TORCH_BOX(&pyfeedback::cuda::add_centered_));
  m.impl("native_alignment_products", TORCH_BOX(&pyfeedback::cuda::alignment_products));
  m.impl("native_center", TORCH_BOX(&pyfeedback::cuda::center));
  m.impl("native_depthwise_backward", TORCH_BOX(&pyfeedback::cuda::depthwise_backward));
  m.impl("native_feedback_step_", TORCH_BOX(&pyfeedback::cuda::feedback_step_));
}
