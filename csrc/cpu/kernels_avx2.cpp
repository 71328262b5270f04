// The same loops again with AVX2, FMA and F16C. Everything that has external linkage is included before the target
// changes: the linker keeps one copy of an inline function and must not keep one that an older processor cannot run.
#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <type_traits>

#include <torch/headeronly/util/Half.h>

#include "../depthwise.h"
#include "../philox.h"
#include "kernels.h"

#define PYFEEDBACK_F16C
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "adamw_step_loops.h"
#include "alignment_loops.h"
#include "center_loops.h"
#include "depthwise_loops.h"
#include "feedback_step_loops.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace pyfeedback::cpu {

const Kernels kAvx2Kernels = {step,         any_nonfinite,   adamw_step, alignment_products, center,
                              add_centered, depthwise_bytes, depthwise,  depthwise_finish};

}  // namespace pyfeedback::cpu

#endif
