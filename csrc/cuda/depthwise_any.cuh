// The kernel of every depthwise or grouped layer that depthwise_tiles.cuh does not implement.
//
// A block processes a few adjacent groups and some samples. A thread processes one group and keeps the sums of some of
// its taps in registers while it iterates over positions; windows overlap in the caches. Adjacent threads read adjacent
// groups in channels_last, and adjacent positions otherwise.
#pragma once

#include <algorithm>

#include "../depthwise.h"
#include "depthwise_chunks.cuh"
#include "launch.cuh"
#include "scalar.cuh"

namespace pyfeedback::cuda {

constexpr int kBlocksOfAny = 2;  // whose registers fit a processor

// The work of one thread for its group.
template <typename Scalar>
struct DepthwiseThread {
  using T = AccType<Scalar>;
  static constexpr int kTaps = 8;  // whose sums a thread keeps at a time

  const DepthwiseLayer& layer;
  const DepthwiseRule<T> rule;
  const int64_t group;
  const int worker, workers;  // index and number of the threads that share the positions of the group

  __device__ __forceinline__ int taps() const { return static_cast<int>(layer.R * layer.S); }

  __device__ __forceinline__ int64_t weight_index(int64_t j, int64_t i, int tap) const {
    return ((group * layer.J + j) * layer.I + i) * taps() + tap;
  }
  __device__ __forceinline__ T weight(const void* weights, int64_t index) const {
    return to_acc(static_cast<const Scalar*>(weights)[index]);
  }

  template <typename Item>
  static __device__ __forceinline__ auto read(const FeatureMap& map, int64_t n, int64_t channel, int row, int column) {
    return to_acc(static_cast<const Item*>(
        map.data)[n * map.sample + channel * map.channel + row * map.row + column * map.column]);
  }

  // The value of a map at a position, minus its mean if there is one.
  static __device__ __forceinline__ T centered(const FeatureMap& map, const FeatureMap& mean, int64_t n,
                                               int64_t channel, int row, int column) {
    const T value = read<Scalar>(map, n, channel, row, column);
    return mean.data ? value - read<T>(mean, 0, channel, row, column) : value;
  }

  // The input under a tap of output position (p, q); zero outside the map.
  __device__ __forceinline__ T under(const FeatureMap& mean, int64_t n, int64_t i, int tap, int p, int q) const {
    const int columns = static_cast<int>(layer.S);
    const int h = static_cast<int>(layer.stride[0]) * p + static_cast<int>(layer.dilation[0]) * (tap / columns) -
                  static_cast<int>(layer.padding[0]);
    const int w = static_cast<int>(layer.stride[1]) * q + static_cast<int>(layer.dilation[1]) * (tap % columns) -
                  static_cast<int>(layer.padding[1]);
    if (h < 0 || h >= layer.H || w < 0 || w >= layer.W) return T(0);
    return centered(layer.input, mean, n, group * layer.I + i, h, w);
  }

  // visit(output) for the output that a tap connects to input position (h, w), if there is one.
  template <typename Visitor>
  __device__ __forceinline__ void over(const FeatureMap& map, const FeatureMap& mean, int64_t n, int64_t j, int tap,
                                       int h, int w, const Visitor& visit) const {
    const int columns = static_cast<int>(layer.S);
    const int down = static_cast<int>(layer.stride[0]), right = static_cast<int>(layer.stride[1]);
    const int above = h + static_cast<int>(layer.padding[0]) - static_cast<int>(layer.dilation[0]) * (tap / columns);
    const int left = w + static_cast<int>(layer.padding[1]) - static_cast<int>(layer.dilation[1]) * (tap % columns);
    const int p = above / down, q = left / right;
    if (above < 0 || left < 0 || p >= layer.P || q >= layer.Q || p * down != above || q * right != left) return;
    visit(centered(map, mean, n, group * layer.J + j, p, q));
  }

  // visit(n, row, column) for the positions of this thread in samples first .. last - 1 of a map.
  template <typename Visitor>
  __device__ __forceinline__ void for_each_position(int64_t first, int64_t last, int64_t rows, int64_t columns,
                                                    const Visitor& visit) const {
    const int count = static_cast<int>(rows * columns), width = static_cast<int>(columns);
    for (int64_t n = first; n < last; ++n) {
      for (int position = worker; position < count; position += workers) visit(n, position / width, position % width);
    }
  }

  // convT(map, B) of input channel i at (h, w).
  __device__ __forceinline__ T dgrad(const FeatureMap& map, const FeatureMap& mean, int64_t n, int64_t i, int h,
                                     int w) const {
    T total = 0;
    for (int64_t j = 0; j < layer.J; ++j) {
      for (int tap = 0; tap < taps(); ++tap) {
        over(map, mean, n, j, tap, h, w,
             [&](T output) { total += weight(layer.feedback, weight_index(j, i, tap)) * output; });
      }
    }
    return total;
  }

  __device__ __forceinline__ void write_grad_input(int64_t first, int64_t last) const {
    for (int64_t i = 0; i < layer.I; ++i) {
      for_each_position(first, last, layer.H, layer.W, [&](int64_t n, int h, int w) {
        const FeatureMap& to = layer.grad_input;
        const int64_t at = n * to.sample + (group * layer.I + i) * to.channel + h * to.row + w * to.column;
        from_acc(dgrad(layer.grad_output, FeatureMap{}, n, i, h, w), static_cast<Scalar*>(to.data)[at]);
      });
    }
  }

  // conv(x, combined) of output channel j at (p, q).
  __device__ __forceinline__ T fprop(int64_t n, int64_t j, int p, int q) const {
    T total = 0;
    for (int64_t i = 0; i < layer.I; ++i) {
      for (int tap = 0; tap < taps(); ++tap) {
        const int64_t index = weight_index(j, i, tap);
        total += rule.combined(weight(layer.feedback, index), weight(layer.weight, index)) *
                 under(layer.mean, n, i, tap, p, q);
      }
    }
    return total;
  }

  // Adds wgrad(x, dy) to the sums of taps begin, begin + 1, ..., and wgrad(x, conv(x, combined)) to those of the data.
  __device__ __forceinline__ void add_windows(int64_t first, int64_t last, int64_t j, int64_t i, int begin,
                                              T (&of_weight)[kTaps], T (&of_data)[kTaps]) const {
    for_each_position(first, last, layer.P, layer.Q, [&](int64_t n, int p, int q) {
      const T dy = read<Scalar>(layer.grad_output, n, group * layer.J + j, p, q);
      const bool with_data = n < layer.samples && rule.has_combined();
      const T response = with_data ? fprop(n, j, p, q) : T(0);
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        if (begin + t >= taps()) break;
        of_weight[t] += under(FeatureMap{}, n, i, begin + t, p, q) * dy;
        if (with_data) of_data[t] += under(layer.mean, n, i, begin + t, p, q) * response;
      }
    });
  }

  // Adds wgrad(null convT(y, B) - amp x, y) to the sums of the same taps.
  __device__ __forceinline__ void add_null(int64_t first, int64_t last, int64_t j, int64_t i, int begin,
                                           T (&of_data)[kTaps]) const {
    for_each_position(first, last, layer.H, layer.W, [&](int64_t n, int h, int w) {
      const T x = centered(layer.input, layer.mean, n, group * layer.I + i, h, w);
      const T z = rule.null * dgrad(layer.response, layer.response_mean, n, i, h, w) - rule.amp_of_null() * x;
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        if (begin + t >= taps()) break;
        over(layer.response, layer.response_mean, n, j, begin + t, h, w, [&](T output) { of_data[t] += z * output; });
      }
    });
  }
};

// The first worker of a group receives the sum over its workers, which are the threads t, t + lanes, ...
template <typename T>
__device__ __forceinline__ T add_workers(T value, int lanes) {
  __shared__ T of_thread[kThreads];
  of_thread[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half >= lanes; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) of_thread[threadIdx.x] += of_thread[threadIdx.x + half];
    __syncthreads();
  }
  const T total = of_thread[threadIdx.x];
  __syncthreads();
  return total;
}

// Chunks of samples. The lanes are adjacent groups of adjacent threads, a power of two.
inline DepthwiseGrid sample_grid(const DepthwiseLayer& layer) {
  int lanes = 1;
  while (layer.input.channel == 1 && lanes < 32 && lanes < layer.G) lanes *= 2;
  return depthwise_grid(layer, kThreads, kBlocksOfAny, lanes, layer.N);
}

// `partial` receives the sums of each chunk.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, kBlocksOfAny)
    depthwise_kernel(const __grid_constant__ DepthwiseLayer layer, DepthwiseGrid grid, double* partial) {
  using Thread = DepthwiseThread<Scalar>;
  using T = AccType<Scalar>;
  const int64_t chunk = blockIdx.x / grid.group_blocks;
  const int lanes = grid.lanes, lane = static_cast<int>(threadIdx.x) % lanes,
            worker = static_cast<int>(threadIdx.x) / lanes;
  const Thread thread{layer, make_rule<T>(layer), blockIdx.x % grid.group_blocks * lanes + lane, worker,
                      kThreads / lanes};
  const bool works = thread.group < layer.G, writes = works && worker == 0;
  const int64_t first = chunk * layer.N / grid.chunks, last = (chunk + 1) * layer.N / grid.chunks;
  const int64_t rule_last = last < layer.samples ? last : layer.samples;
  double* sums = partial + chunk * sums_of(layer);

  if (works && layer.grad_input.data) thread.write_grad_input(first, last);
  for (int64_t j = 0; j < layer.J; ++j) {
    for (int64_t i = 0; i < layer.I; ++i) {
      for (int begin = 0; begin < thread.taps(); begin += Thread::kTaps) {
        T of_weight[Thread::kTaps] = {}, of_data[Thread::kTaps] = {};
        if (works) thread.add_windows(first, last, j, i, begin, of_weight, of_data);
        if (works && thread.rule.null != 0) thread.add_null(first, rule_last, j, i, begin, of_data);
        const int64_t index = thread.weight_index(j, i, begin);
#pragma unroll
        for (int t = 0; t < Thread::kTaps; ++t) {
          if (begin + t >= thread.taps()) break;
          const T weight_sum = add_workers(of_weight[t], lanes), data_sum = add_workers(of_data[t], lanes);
          if (writes) {
            sums[index + t] = weight_sum;
            sums[weights_of(layer) + index + t] = data_sum;
          }
        }
      }
    }
    if (layer.grad_bias == nullptr) continue;
    T bias = 0;
    if (works) {
      thread.for_each_position(first, last, layer.P, layer.Q, [&](int64_t n, int p, int q) {
        bias += Thread::template read<Scalar>(layer.grad_output, n, thread.group * layer.J + j, p, q);
      });
    }
    bias = add_workers(bias, lanes);
    if (writes) sums[2 * weights_of(layer) + thread.group * layer.J + j] = bias;
  }
}

}  // namespace pyfeedback::cuda
