// Storage types and their conversion to the acc type.
// Unnamed namespaces separate the code that kernels_avx2.cpp compiles for another instruction set from the rest.
#pragma once

#include <cstdint>
#include <cstring>

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

inline double to_acc(double value) {
  return value;
}
inline float to_acc(float value) {
  return value;
}

inline float to_acc(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float acc;
  std::memcpy(&acc, &bits, sizeof(acc));
  return acc;
}

inline float to_acc(Float16 value) {
#ifdef PYFEEDBACK_F16C
  return _cvtsh_ss(value.bits);
#else
  return static_cast<float>(torch::headeronly::Half(value.bits, torch::headeronly::Half::from_bits()));
#endif
}

inline void from_acc(double value, double& result) {
  result = value;
}
inline void from_acc(float value, float& result) {
  result = value;
}

// Rounds to nearest, ties to even. A nan keeps a bit of its mantissa.
inline void from_acc(float value, BFloat16& result) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  result.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void from_acc(float value, Float16& result) {
#ifdef PYFEEDBACK_F16C
  result.bits = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  result.bits = torch::headeronly::Half(value).x;
#endif
}

// Many values at once: scalar conversions of float16 would keep the loop around them from being vectorized.
template <typename Scalar>
inline void to_acc(const Scalar* from, AccType<Scalar>* to, int64_t count) {
  int64_t i = 0;
#ifdef PYFEEDBACK_F16C
  if constexpr (std::is_same_v<Scalar, Float16>) {
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
#endif
  for (; i < count; ++i) to[i] = to_acc(from[i]);
}

template <typename Scalar>
inline void from_acc(const AccType<Scalar>* from, Scalar* to, int64_t count) {
  int64_t i = 0;
#ifdef PYFEEDBACK_F16C
  if constexpr (std::is_same_v<Scalar, Float16>) {
    for (; i + 8 <= count; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < count; ++i) from_acc(from[i], to[i]);
}

// Integer tests of the exponent, which vectorize. A floating-point comparison would have to keep its order.
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
