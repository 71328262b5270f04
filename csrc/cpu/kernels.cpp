// The CPU kernels for the baseline instruction set, and the choice between these and those for AVX2.
#include "all_kernels.h"

namespace pyfeedback::cpu {

extern const Kernels kAvx2Kernels;  // kernels_avx2.cpp

const Kernels& kernels() {
#if defined(__x86_64__)
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) return kAvx2Kernels;
#endif
  return kKernels;
}

}  // namespace pyfeedback::cpu
