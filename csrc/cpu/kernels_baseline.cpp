#include "center_loops.h"
#include "feedback_step_loops.h"
#include "kernels.h"

namespace pyfeedback::cpu {

const Kernels kBaselineKernels = {step, any_nonfinite, center};

}  // namespace pyfeedback::cpu
