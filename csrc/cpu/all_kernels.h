// All CPU kernels, for the instruction set of the file that includes this one.
#pragma once

#include "alignment_kernels.h"
#include "center_kernels.h"
#include "dense_kernels.h"
#include "depthwise_kernels.h"
#include "kernels.h"
#include "probes_kernels.h"
#include "step_kernels.h"

namespace pyfeedback::cpu {
namespace {

constexpr Kernels kKernels = {step<FeedbackRow, FeedbackOptions>,
                              step<AdamWRow, AdamWOptions>,
                              any_nonfinite,
                              alignment_products,
                              center,
                              add_centered,
                              depthwise_bytes,
                              depthwise,
                              depthwise_finish,
                              dense_bytes,
                              dense,
                              probe_gradients};

}  // namespace
}  // namespace pyfeedback::cpu
