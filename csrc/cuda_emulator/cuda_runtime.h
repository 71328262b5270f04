// The parts of CUDA that the kernels of this repository use, for a host compiler. grid.h describes how a grid runs.
// If this folder is first on the include path, the sources of the kernels compile unchanged.
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
#define __shared__ thread_local  // implies static; only one block runs at a time

using dim3 = cuda_emulator::Index;
extern thread_local cuda_emulator::Index threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

inline void __syncthreads() {
  cuda_emulator::wait_for_block(false);
}
inline int __syncthreads_count(int predicate) {
  return cuda_emulator::wait_for_block(predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return cuda_emulator::wait_for_block(predicate != 0) != 0;
}
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 16, "lanes exchange at most 16 bytes");
  cuda_emulator::exchange(mask, source % cuda_emulator::kWarp, &value, sizeof(T));
  return value;
}
inline void __syncwarp(unsigned mask = ~0u) {
  char nothing = 0;
  cuda_emulator::exchange(mask, cuda_emulator::lane(), &nothing, sizeof(nothing));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  return __shfl_sync(mask, value, cuda_emulator::lane() ^ lanes);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned source = cuda_emulator::lane() + delta;
  return __shfl_sync(mask, value, source < cuda_emulator::kWarp ? source : cuda_emulator::lane());
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  return __shfl_sync(mask, value,
                     delta <= cuda_emulator::lane() ? cuda_emulator::lane() - delta : cuda_emulator::lane());
}

// Fibers switch only where they wait, so a plain read and write is atomic.
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
template <typename T>
T __ldg(const T* address) {
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

namespace cuda_emulator {

inline Order order = Order::kForward;
inline std::string last_error;  // of the last launch that failed

}  // namespace cuda_emulator

// Runs the kernel before it returns.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->dynamicSmemBytes != 0) return cudaErrorInvalidValue;
  const std::string error =
      cuda_emulator::run_grid(config->gridDim, config->blockDim, cuda_emulator::order, [&] { kernel(arguments...); });
  if (error.empty()) return cudaSuccess;
  cuda_emulator::last_error = error;
  return cudaErrorLaunchFailure;
}
