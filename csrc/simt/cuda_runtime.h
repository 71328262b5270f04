// As much of CUDA as the kernels of this repository use, for a host compiler: see grid.h for how they run. The
// folder stands first on the include path, so that the same sources compile as they are.
#pragma once

#include <algorithm>
#include <cstring>
#include <math.h>
#include <string>

#include "grid.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local  // which is static, and there is one block at a time

using dim3 = simt::Index;
extern thread_local simt::Index threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

inline void __syncthreads() {
  simt::wait_for_block(false);
}
inline int __syncthreads_count(int predicate) {
  return simt::wait_for_block(predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return simt::wait_for_block(predicate != 0) != 0;
}
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 16, "more than lanes exchange at once");
  simt::exchange(mask, source % simt::kWarp, &value, sizeof(T));
  return value;
}
inline void __syncwarp(unsigned mask = ~0u) {
  char nothing = 0;
  simt::exchange(mask, simt::lane(), &nothing, sizeof(nothing));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  return __shfl_sync(mask, value, simt::lane() ^ lanes);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned source = simt::lane() + delta;
  return __shfl_sync(mask, value, source < simt::kWarp ? source : simt::lane());
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  return __shfl_sync(mask, value, delta <= simt::lane() ? simt::lane() - delta : simt::lane());
}

// Fibers change places only where they wait, so that a plain read and write is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = static_cast<T>(old + value);
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <typename T>
T atomicExch(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
template <typename T>
void __stwb(T* address, T value) {
  *address = value;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace simt {

inline Order order = Order::kForward;
inline std::string last_error;  // of the latest launch that failed

}  // namespace simt

// Runs the kernel before it returns.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->dynamicSmemBytes != 0) return cudaErrorInvalidValue;
  const std::string error =
      simt::run_grid(config->gridDim, config->blockDim, simt::order, [&] { kernel(arguments...); });
  if (error.empty()) return cudaSuccess;
  simt::last_error = error;
  return cudaErrorLaunchFailure;
}
