// The four floating-point dtypes of the native ops, without a torch header.
#pragma once

#include <cstdint>

namespace pyfeedback {

enum class Dtype : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace pyfeedback
