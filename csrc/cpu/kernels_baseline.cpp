#include "adamw_step_loops.h"
#include "alignment_loops.h"
#include "center_loops.h"
#include "depthwise_loops.h"
#include "feedback_step_loops.h"
#include "kernels.h"

namespace pyfeedback::cpu {

const Kernels kBaselineKernels = {step,         any_nonfinite,   adamw_step, alignment_products, center,
                                  add_centered, depthwise_bytes, depthwise,  depthwise_finish};

}  // namespace pyfeedback::cpu
