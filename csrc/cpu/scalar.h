// Storage types and their conversion to the type that the arithmetic is done in: float, or double for double.
// In an unnamed namespace because kernels_avx2.cpp compiles it for another instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/Half.h>

#include "../dtype.h"

namespace pyfeedback::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename Scalar>
using Wide = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

inline double widen(double value) { return value; }
inline float widen(float value) { return value; }

inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

inline float widen(Float16 value) {
#ifdef PYFEEDBACK_F16C
  return _cvtsh_ss(value.bits);
#else
  return static_cast<float>(torch::headeronly::Half(value.bits, torch::headeronly::Half::from_bits()));
#endif
}

inline void narrow(double value, double& result) { result = value; }
inline void narrow(float value, float& result) { result = value; }

// To nearest, ties to even; a nan keeps a bit of its mantissa.
inline void narrow(float value, BFloat16& result) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  result.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void narrow(float value, Float16& result) {
#ifdef PYFEEDBACK_F16C
  result.bits = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  result.bits = torch::headeronly::Half(value).x;
#endif
}

// Integer tests of the exponent, which vectorise; a floating comparison would have to keep its order.
inline uint64_t nonfinite(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (bits & 0x7ff0000000000000u) == 0x7ff0000000000000u;
}
inline uint32_t nonfinite(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (bits & 0x7f800000u) == 0x7f800000u;
}
inline uint16_t nonfinite(BFloat16 value) { return (value.bits & 0x7f80u) == 0x7f80u; }
inline uint16_t nonfinite(Float16 value) { return (value.bits & 0x7c00u) == 0x7c00u; }

// visit(Scalar{}) for the storage type of `dtype`.
template <typename Visitor>
inline auto visit_dtype(Dtype dtype, const Visitor& visit) {
  switch (dtype) {
    case Dtype::kFloat64:
      return visit(double{});
    case Dtype::kFloat32:
      return visit(float{});
    case Dtype::kBFloat16:
      return visit(BFloat16{});
    default:
      return visit(Float16{});
  }
}

}  // namespace
}  // namespace pyfeedback::cpu
