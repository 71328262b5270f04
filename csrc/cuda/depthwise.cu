// A block processes a few adjacent groups and some samples. A thread processes one group and keeps the sums of its taps
// in registers while it iterates over positions; windows overlap in the caches. Adjacent threads read adjacent groups
// in channels_last, and adjacent positions otherwise.
#include <algorithm>

#include "../depthwise.h"
#include "launch.cuh"
#include "scalar.cuh"

namespace pyfeedback::cuda {

namespace {

constexpr int64_t kTargetBlocks = 2048;  // about: several for every processor of any GPU
constexpr int kTapsAtOnce = 8;           // for kernel sizes without a specialization

// The number of groups of adjacent threads, a power of two.
int lanes_of(const DepthwiseLayer& layer) {
  int lanes = 1;
  while (layer.input.channel == 1 && lanes < 32 && lanes < layer.G) lanes *= 2;
  return lanes;
}

int64_t tiles_of(const DepthwiseLayer& layer) {
  return (layer.G + lanes_of(layer) - 1) / lanes_of(layer);
}

__host__ __device__ __forceinline__ int64_t weights_of(const DepthwiseLayer& layer) {
  return layer.G * layer.J * layer.I * layer.R * layer.S;
}

// The number of chunks that the samples are split into.
int64_t chunks_of(const DepthwiseLayer& layer) {
  return std::clamp<int64_t>(kTargetBlocks / tiles_of(layer), 1, layer.N);
}

// The number of sums of one chunk: of grad_weight, of the data terms of the rule, of the bias.
__host__ __device__ __forceinline__ int64_t sums_of(const DepthwiseLayer& layer) {
  return 2 * weights_of(layer) + layer.G * layer.J;
}

// The work of one thread for its group. kSide is the side of a square kernel with one input channel per group, or 0
// for any kernel.
template <typename Scalar, int kSide>
struct DepthwiseThread {
  using T = AccType<Scalar>;
  static constexpr int kTaps = kSide ? kSide * kSide : kTapsAtOnce;

  const DepthwiseLayer& layer;
  const DepthwiseRule<T> rule;
  const int64_t group;
  const int worker, workers;  // index and number of the threads that share the positions of the group

  __device__ __forceinline__ int kernel_columns() const { return kSide ? kSide : static_cast<int>(layer.S); }
  __device__ __forceinline__ int taps() const { return kSide ? kSide * kSide : static_cast<int>(layer.R * layer.S); }

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

  // The input under a tap of output position (p, q); zero outside the map.
  __device__ __forceinline__ T under(const FeatureMap& map, int64_t n, int64_t i, int tap, int p, int q,
                                     bool is_mean = false) const {
    const int h = static_cast<int>(layer.stride[0]) * p +
                  static_cast<int>(layer.dilation[0]) * (tap / kernel_columns()) - static_cast<int>(layer.padding[0]);
    const int w = static_cast<int>(layer.stride[1]) * q +
                  static_cast<int>(layer.dilation[1]) * (tap % kernel_columns()) - static_cast<int>(layer.padding[1]);
    if (h < 0 || h >= layer.H || w < 0 || w >= layer.W) return T(0);
    return is_mean ? read<T>(map, 0, group * layer.I + i, h, w) : read<Scalar>(map, n, group * layer.I + i, h, w);
  }

  // The output that a tap connects to input position (h, w), minus its mean if there is one; zero outside the map.
  __device__ __forceinline__ T over(const FeatureMap& map, const FeatureMap& mean, int64_t n, int64_t j, int tap, int h,
                                    int w) const {
    const int down = static_cast<int>(layer.stride[0]), right = static_cast<int>(layer.stride[1]);
    const int above =
        h + static_cast<int>(layer.padding[0]) - static_cast<int>(layer.dilation[0]) * (tap / kernel_columns());
    const int left =
        w + static_cast<int>(layer.padding[1]) - static_cast<int>(layer.dilation[1]) * (tap % kernel_columns());
    const int p = above / down, q = left / right;
    if (above < 0 || left < 0 || p >= layer.P || q >= layer.Q || p * down != above || q * right != left) return T(0);
    const T value = read<Scalar>(map, n, group * layer.J + j, p, q);
    return mean.data ? value - read<T>(mean, 0, group * layer.J + j, p, q) : value;
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
        total += weight(layer.feedback, weight_index(j, i, tap)) * over(map, mean, n, j, tap, h, w);
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

  // Adds grad_weight and wgrad(x, conv(x, combined)) to the sums of taps begin .. begin + count - 1.
  __device__ __forceinline__ void add_windows(int64_t first, int64_t last, int64_t j, int64_t i, int begin, int count,
                                              T (&of_weight)[kTaps], T (&of_data)[kTaps]) const {
    for_each_position(first, last, layer.P, layer.Q, [&](int64_t n, int p, int q) {
      T value[kTaps];
      const T dy = read<Scalar>(layer.grad_output, n, group * layer.J + j, p, q);
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        value[t] = t < count ? under(layer.input, n, i, begin + t, p, q) : T(0);
        of_weight[t] += value[t] * dy;
      }
      if (n >= layer.samples || !rule.has_combined()) return;
      if (layer.mean.data) {
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          if (t < count) value[t] -= under(layer.mean, n, i, begin + t, p, q, true);
        }
      }
      const T response = fprop(n, j, p, q, value);
#pragma unroll
      for (int t = 0; t < kTaps; ++t) of_data[t] += value[t] * response;
    });
  }

  // conv(x, combined) of output channel j. `value` is the whole window if kSide > 0.
  __device__ __forceinline__ T fprop(int64_t n, int64_t j, int p, int q, const T (&value)[kTaps]) const {
    T total = 0;
    if constexpr (kSide > 0) {
#pragma unroll
      for (int t = 0; t < kTaps; ++t) total += combined(weight_index(j, 0, t)) * value[t];
    } else {
      for (int64_t i = 0; i < layer.I; ++i) {
        for (int tap = 0; tap < taps(); ++tap) {
          T x = under(layer.input, n, i, tap, p, q);
          if (layer.mean.data) x -= under(layer.mean, n, i, tap, p, q, true);
          total += combined(weight_index(j, i, tap)) * x;
        }
      }
    }
    return total;
  }
  __device__ __forceinline__ T combined(int64_t index) const {
    return rule.combined(weight(layer.feedback, index), weight(layer.weight, index));
  }

  // Adds wgrad(null convT(y, B) - amp x, y) to the sums of the same taps.
  __device__ __forceinline__ void add_null(int64_t first, int64_t last, int64_t j, int64_t i, int begin, int count,
                                           T (&of_data)[kTaps]) const {
    for_each_position(first, last, layer.H, layer.W, [&](int64_t n, int h, int w) {
      const int64_t channel = group * layer.I + i;
      T x = read<Scalar>(layer.input, n, channel, h, w);
      if (layer.mean.data) x -= read<T>(layer.mean, 0, channel, h, w);
      const T z = rule.null * dgrad(layer.response, layer.response_mean, n, i, h, w) - rule.amp_of_null() * x;
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        if (t < count) of_data[t] += z * over(layer.response, layer.response_mean, n, j, begin + t, h, w);
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

// `partial` receives the sums of each chunk.
template <typename Scalar, int kSide>
__global__ void __launch_bounds__(kThreads, 1)  // one block per processor leaves enough registers for 7x7 kernels
    depthwise_kernel(const __grid_constant__ DepthwiseLayer layer, int lanes, int64_t tiles, int64_t chunks,
                     double* partial) {
  using Thread = DepthwiseThread<Scalar, kSide>;
  using T = AccType<Scalar>;
  const int64_t tile = blockIdx.x % tiles, chunk = blockIdx.x / tiles;
  const int lane = static_cast<int>(threadIdx.x) % lanes, worker = static_cast<int>(threadIdx.x) / lanes;
  const Thread thread{layer, make_rule<T>(layer), tile * lanes + lane, worker, kThreads / lanes};
  const bool works = thread.group < layer.G, writes = works && worker == 0;
  const int64_t first = chunk * layer.N / chunks, last = (chunk + 1) * layer.N / chunks;
  const int64_t rule_last = last < layer.samples ? last : layer.samples;
  double* sums = partial + chunk * sums_of(layer);

  if (works && layer.grad_input.data) thread.write_grad_input(first, last);
  for (int64_t j = 0; j < layer.J; ++j) {
    for (int64_t i = 0; i < layer.I; ++i) {
      for (int begin = 0; begin < thread.taps(); begin += Thread::kTaps) {
        const int left = thread.taps() - begin, count = left < Thread::kTaps ? left : Thread::kTaps;
        T of_weight[Thread::kTaps] = {}, of_data[Thread::kTaps] = {};
        if (works) thread.add_windows(first, last, j, i, begin, count, of_weight, of_data);
        if (works && thread.rule.null != 0) thread.add_null(first, rule_last, j, i, begin, count, of_data);
        const int64_t index = thread.weight_index(j, i, begin);
#pragma unroll
        for (int t = 0; t < Thread::kTaps; ++t) {
          if (t >= count) break;
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

// A thread adds up the chunks of one weight, or of one bias, in their order.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ DepthwiseLayer layer, int64_t chunks, const double* partial) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, weights = weights_of(layer);
  const auto sum = [&](int64_t at) {
    double total = 0;
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

}  // namespace

int64_t depthwise_partial(const DepthwiseLayer& layer) {
  return chunks_of(layer) * sums_of(layer);
}

cudaError_t launch_depthwise(const DepthwiseLayer& layer, double* partial, cudaStream_t stream) {
  const int lanes = lanes_of(layer);
  const int64_t tiles = tiles_of(layer), chunks = chunks_of(layer);
  const auto run = [&](auto kernel) {
    return launch(kernel, tiles * chunks, stream, layer, lanes, tiles, chunks, partial);
  };
  const cudaError_t error = visit_dtype(layer.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const int64_t side = layer.I == 1 && layer.R == layer.S ? layer.R : 0;
    if constexpr (!std::is_same_v<Scalar, double>) {
      if (side == 3) return run(depthwise_kernel<Scalar, 3>);
      if (side == 5) return run(depthwise_kernel<Scalar, 5>);
      if (side == 7) return run(depthwise_kernel<Scalar, 7>);
    }
    return run(depthwise_kernel<Scalar, 0>);
  });
  if (error != cudaSuccess) return error;
  const int64_t blocks = (weights_of(layer) + layer.G * layer.J + kThreads - 1) / kThreads;
  return visit_dtype(layer.dtype, [&](auto scalar) {
    return launch(finish_kernel<decltype(scalar)>, blocks, stream, layer, chunks, static_cast<const double*>(partial));
  });
}

}  // namespace pyfeedback::cuda
