// A depthwise backward is divided into chunks, and a second launch adds their sums in a fixed order.
#pragma once

#include <algorithm>

#include "../depthwise.h"
#include "launch.cuh"
#include "scalar.cuh"

namespace pyfeedback::cuda {

// Block b computes chunk b / group_blocks of `lanes` adjacent groups.
struct DepthwiseGrid {
  int threads, lanes;
  int64_t group_blocks, chunks;
  int64_t tiles_down, tiles_right;  // of a map, if chunks consist of tiles
};

// The grid of so many units of work, with about as many blocks as run at the same time on an H100.
inline DepthwiseGrid depthwise_grid(const DepthwiseLayer& layer, int threads, int blocks_of_processor, int lanes,
                                    int64_t units) {
  constexpr int64_t kProcessors = 132;
  DepthwiseGrid grid{};
  grid.threads = threads;
  grid.lanes = lanes;
  grid.group_blocks = (layer.G + lanes - 1) / lanes;
  grid.chunks = std::clamp<int64_t>(kProcessors * blocks_of_processor / grid.group_blocks, 1, units);
  return grid;
}

__host__ __device__ __forceinline__ int64_t weights_of(const DepthwiseLayer& layer) {
  return layer.G * layer.J * layer.I * layer.R * layer.S;
}

// The number of sums of one chunk: of grad_weight, of the data terms of the rule, of the bias.
__host__ __device__ __forceinline__ int64_t sums_of(const DepthwiseLayer& layer) {
  return 2 * weights_of(layer) + layer.G * layer.J;
}

// A thread adds up the chunks of one weight, or of one bias, in their order.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ DepthwiseLayer layer, int64_t chunks, const double* partial) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, weights = weights_of(layer);
  const auto sum = [&](int64_t at) {
    double total = 0;
#pragma unroll 8
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * sums_of(layer) + at];
    return total;
  };
  const auto set = [](void* to, int64_t at, double value) {
    if (to) from_acc(static_cast<AccType<Scalar>>(value), static_cast<Scalar*>(to)[at]);
  };
  if (index < weights) {
    const double grad_weight = sum(index), data = sum(weights + index);
    const double weight = to_acc(static_cast<const Scalar*>(layer.weight)[index]);
    const double feedback = to_acc(static_cast<const Scalar*>(layer.feedback)[index]);
    const auto rule = make_rule<double>(layer);
    set(layer.grad_weight, index, grad_weight);
    set(layer.grad_feedback, index,
        rule.gradient(data, static_cast<double>(layer.samples), feedback, weight, grad_weight));
  } else if (index < weights + layer.G * layer.J && layer.grad_bias != nullptr) {
    set(layer.grad_bias, index - weights, sum(weights + index));
  }
}

inline cudaError_t launch_finish(const DepthwiseLayer& layer, int64_t chunks, const double* partial,
                                 cudaStream_t stream) {
  const int64_t blocks = (weights_of(layer) + layer.G * layer.J + kThreads - 1) / kThreads;
  return visit_dtype(layer.dtype, [&](auto scalar) {
    return launch(finish_kernel<decltype(scalar)>, blocks, stream, layer, chunks, partial);
  });
}

}  // namespace pyfeedback::cuda
