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

inline double widen(double value) {
  return value;
}
inline float widen(float value) {
  return value;
}

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

inline void narrow(double value, double& result) {
  result = value;
}
inline void narrow(float value, float& result) {
  result = value;
}

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

// Rows of 16-bit values are converted as a whole: scalar conversions of float16 keep a loop from being vectorised.
template <typename Scalar>
inline void widen_row(const Scalar* from, Wide<Scalar>* to, int64_t count) {
  int64_t i = 0;
#ifdef PYFEEDBACK_F16C
  if constexpr (std::is_same_v<Scalar, Float16>) {
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
#endif
  for (; i < count; ++i) to[i] = widen(from[i]);
}

template <typename Scalar>
inline void narrow_row(const Wide<Scalar>* from, Scalar* to, int64_t count) {
  int64_t i = 0;
#ifdef PYFEEDBACK_F16C
  if constexpr (std::is_same_v<Scalar, Float16>) {
    for (; i + 8 <= count; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < count; ++i) narrow(from[i], to[i]);
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
inline uint16_t nonfinite(BFloat16 value) {
  return (value.bits & 0x7f80u) == 0x7f80u;
}
inline uint16_t nonfinite(Float16 value) {
  return (value.bits & 0x7c00u) == 0x7c00u;
}

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
