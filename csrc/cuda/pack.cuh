// Packs of adjacent elements, loaded and stored 16 bytes at a time if every operand is aligned.
#pragma once

#include <cstdint>
#include <cstring>

#include "scalar.cuh"

namespace pyfeedback::cuda {

constexpr int kAccessBytes = 16;

// Elements that a thread processes at a time: at least the four that share one draw of noise.
template <typename Scalar>
constexpr int kPack = sizeof(Scalar) == 2 ? 8 : 4;

template <typename Scalar>
struct alignas(kAccessBytes) Pack {
  Scalar value[kPack<Scalar>];
};

template <typename... Pointers>
__device__ __forceinline__ bool is_aligned(Pointers... pointers) {
  return (reinterpret_cast<uintptr_t>(pointers) | ...) % kAccessBytes == 0;
}

// Elements first .. first + count - 1 of one operand, or zeros if `operand` is null. `whole` means that `count` is the
// width of a pack and the operand is aligned.
template <typename Scalar>
__device__ __forceinline__ Pack<Scalar> load(const void* operand, int64_t first, int count, bool whole) {
  Pack<Scalar> pack{};
  if (operand == nullptr) return pack;
  const Scalar* from = static_cast<const Scalar*>(operand) + first;
  if (whole) return *reinterpret_cast<const Pack<Scalar>*>(from);
#pragma unroll
  for (int j = 0; j < kPack<Scalar>; ++j) {
    if (j < count) pack.value[j] = from[j];
  }
  return pack;
}

template <typename Scalar>
__device__ __forceinline__ void store(const Pack<Scalar>& pack, void* operand, int64_t first, int count, bool whole) {
  Scalar* to = static_cast<Scalar*>(operand) + first;
  if (whole) {
    // nvcc 13 compiles a plain assignment to one store for each element, whatever the alignment.
    constexpr int kAccesses = sizeof(pack) / kAccessBytes;
    uint4 bytes[kAccesses];
    memcpy(bytes, &pack, sizeof(pack));
#pragma unroll
    for (int k = 0; k < kAccesses; ++k) __stwb(reinterpret_cast<uint4*>(to) + k, bytes[k]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kPack<Scalar>; ++j) {
    if (j < count) to[j] = pack.value[j];
  }
}

// One element, or zero if `operand` is null.
template <typename Scalar>
__device__ __forceinline__ Scalar read(const void* operand, int64_t offset) {
  return operand ? static_cast<const Scalar*>(operand)[offset] : Scalar{};
}

}  // namespace pyfeedback::cuda
