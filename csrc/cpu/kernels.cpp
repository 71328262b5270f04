#include "loops.h"

namespace pyfeedback::cpu {

extern const Kernels kAvx2Kernels;  // kernels_avx2.cpp

const Kernels& kernels() {
#if defined(__x86_64__)
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) return kAvx2Kernels;
#endif
  return kLoops;
}

}  // namespace pyfeedback::cpu
