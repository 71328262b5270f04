// The four floating-point dtypes of the compiled ops and the acc type of their arithmetic, without a torch header.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pyfeedback {

enum class Dtype : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// float, or double for double.
template <typename Scalar>
using AccType = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

template <typename Scalar>
constexpr bool kIsAccType = std::is_same_v<Scalar, AccType<Scalar>>;

}  // namespace pyfeedback
