#include "adamw_step_loops.h"
#include "alignment_loops.h"
#include "center_loops.h"
#include "feedback_step_loops.h"
#include "kernels.h"

namespace pyfeedback::cpu {

const Kernels kBaselineKernels = {step, any_nonfinite, adamw_step, alignment_products, center};

}  // namespace pyfeedback::cpu
