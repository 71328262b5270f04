// Sums over a block and over the blocks of a row, in an order that does not depend on which block finishes first.
#pragma once

#include "launch.cuh"

namespace pyfeedback::cuda {

constexpr int kWarp = 32;

template <typename T>
__device__ __forceinline__ void add_lanes(T& value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
}

// Returns true in every thread of the last block of a row to arrive. This block then sees what the first thread of each
// block wrote before. `arrived` counts the blocks from zero.
__device__ __forceinline__ bool is_last(unsigned* arrived, unsigned blocks) {
  __threadfence();
  return __syncthreads_or(threadIdx.x == 0 && atomicAdd(arrived, 1u) == blocks - 1);
}

}  // namespace pyfeedback::cuda
