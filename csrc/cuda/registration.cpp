// The CUDA library: registers the ops whose schemas are in pyfeedback/ops/schemas.py.
#include "../ops.h"
#include "backend.h"

STABLE_TORCH_LIBRARY_IMPL(pyfeedback, CUDA, m) {
  pyfeedback::register_ops<pyfeedback::cuda::Backend>(m);
}
