// The kernels compiled for AVX2, FMA and F16C. Everything with external linkage is included before the target changes:
// the linker keeps one copy of an inline function, and it must be one that an older processor can run.
#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <type_traits>

#include <torch/headeronly/util/Half.h>

#include "../philox.h"
#include "kernels.h"

#define PYFEEDBACK_F16C
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "all_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace pyfeedback::cpu {

extern const Kernels kAvx2Kernels = kKernels;

}  // namespace pyfeedback::cpu

#endif
