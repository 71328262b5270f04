// All CPU kernels, for the instruction set of the file that includes this one.
#pragma once

#include "alignment_loops.h"
#include "center_loops.h"
#include "depthwise_loops.h"
#include "kernels.h"
#include "step_loops.h"

namespace pyfeedback::cpu {
namespace {

constexpr Kernels kLoops = {step<FeedbackRow, FeedbackOptions>,
                            step<AdamWRow, AdamWOptions>,
                            any_nonfinite,
                            alignment_products,
                            center,
                            add_centered,
                            depthwise_bytes,
                            depthwise,
                            depthwise_finish};

}  // namespace
}  // namespace pyfeedback::cpu
