// The CPU library: registers the ops whose schemas are in pyfeedback/ops/schemas.py.
#include "../ops.h"
#include "backend.h"

STABLE_TORCH_LIBRARY_IMPL(pyfeedback, CPU, m) {
  using pyfeedback::cpu::Backend;
  pyfeedback::register_ops<Backend>(m);
  m.impl("extension_adamw_step_", TORCH_BOX(&pyfeedback::adamw_step_<Backend>));
  m.impl("extension_dense_backward", TORCH_BOX(&pyfeedback::dense_backward<Backend>));
  m.impl("extension_probe_gradients", TORCH_BOX(&pyfeedback::probe_gradients<Backend>));
}
