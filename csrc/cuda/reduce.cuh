// Sums over a block and over the blocks of a row, in an order that does not depend on which comes first.
#pragma once

#include "launch.cuh"

namespace pyfeedback::cuda {

constexpr int kWarp = 32;

template <typename Wide>
__device__ __forceinline__ void add_lanes(Wide& value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
}

// True in every thread of the block of a row that comes last: what each block's first thread wrote before is visible
// to it. `arrived` counts the blocks, from zero.
__device__ __forceinline__ bool is_last(unsigned* arrived, unsigned blocks) {
  __threadfence();
  return __syncthreads_or(threadIdx.x == 0 && atomicAdd(arrived, 1u) == blocks - 1);
}

}  // namespace pyfeedback::cuda
