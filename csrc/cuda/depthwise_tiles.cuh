// The kernel of depthwise layers with one output channel per group, a square kernel without dilation and the same
// stride in both directions. It computes in shared memory, tile by tile.
//
// A tile is kRows x kColumns positions of the output map and the kStride times as many rows and columns of the input
// map that begin at kStride * (p, q) - padding, for kLanes adjacent groups. The input part in shared memory extends
// below and to the right of the tile as far as the taps reach from its outputs, the output part above and to the left
// as far as they reach from its inputs. Tap r connects output row p of the tile to row kStride * p + r of the input
// part, and, the other way around, input row kStride * p + r % kStride to output row p - r / kStride.
#pragma once

#include <algorithm>

#include "../depthwise.h"
#include "depthwise_chunks.cuh"
#include "launch.cuh"
#include "scalar.cuh"

namespace pyfeedback::cuda {

// The part of a map that a block holds, with the lanes of a position next to each other. The gaps prevent bank
// conflicts: between the threads that load adjacent positions of a lane, and between the two rows, kStep apart, that a
// warp multiplies at a time.
template <typename T, int kRowsOfPart, int kColumnsOfPart, int kLanes, int kStep>
struct MapPart {
  static constexpr int kRows = kRowsOfPart, kColumns = kColumnsOfPart;
  static constexpr int kPosition = kLanes + 1, kBanks = 32;
  static constexpr int row_pitch() {
    int pitch = kColumns * kPosition;
    while (pitch * kStep % kBanks != kBanks / 2) ++pitch;
    return pitch;
  }

  T value[kRows * row_pitch()];

  static __device__ __forceinline__ int index(int row, int column, int lane) {
    return row * row_pitch() + column * kPosition + lane;
  }
  __device__ __forceinline__ T& at(int row, int column, int lane) { return value[index(row, column, lane)]; }
};

__device__ __forceinline__ bool is_inside(int i, int size) {
  return static_cast<unsigned>(i) < static_cast<unsigned>(size);
}

// The work of one thread, which owns a row of outputs of one group in each tile of its block.
template <int kSideOfKernel, int kStrideOfLayer>
struct DepthwiseTile {
  using T = float;  // the dtype is looked up where a map is read or written, so that few kernels are compiled
  static constexpr int kSide = kSideOfKernel, kStride = kStrideOfLayer, kTaps = kSide * kSide;
  static constexpr int kLanes = 16, kRows = 8 / kStride, kColumns = 8;
  static constexpr int kBlockThreads = kLanes * kRows;
  static constexpr int kReach = (kSide - 1) / kStride;  // output rows above a tile that its input rows are connected to
  static constexpr int kSpan = kStride * (kColumns - 1) + kSide;  // input columns under a row of a tile

  // Which sums a thread keeps: those of all taps, over its row of each tile; or, since all sums of a 7x7 kernel would
  // not fit its registers, those of kTapRows rows of the kernel, over all rows of a tile.
  static constexpr bool kByKernelRow = kSide > 5;
  static constexpr int kTapRows = kByKernelRow ? (kSide + kRows - 1) / kRows : kSide;
  static constexpr int kSums = kTapRows * kSide;
  // How much is unrolled: rows of a kernel; loads, which a thread waits for together.
  static constexpr int kRowsAtOnce = kSide > 3 ? 1 : kSide, kLoadsAtOnce = kSide > 3 ? 4 : 8;

  // What the threads of a block share.
  struct Shared {
    MapPart<T, kStride*(kRows - 1) + kSide, kSpan, kLanes, kStride> input;
    MapPart<T, kRows + kReach, kColumns + kReach, kLanes, 1> output;
    T feedback[kTaps][kLanes], combined[kTaps][kLanes];
    DepthwiseLayer layer;  // what nvcc derives from it is then not kept in registers across barriers
  };

  // The blocks whose registers, at most 128 or 80 of a thread, and shared memory fit a processor.
  static constexpr int kBlocks = std::min<int>((kSums > 20 ? 512 : 768) / kBlockThreads, 200 * 1024 / sizeof(Shared));

  static bool supports(const DepthwiseLayer& layer) {
    return layer.I == 1 && layer.J == 1 && layer.R == kSide && layer.S == kSide && layer.stride[0] == kStride &&
           layer.stride[1] == kStride && layer.dilation[0] == 1 && layer.dilation[1] == 1 &&
           layer.dtype != Dtype::kFloat64;
  }

  const DepthwiseLayer& layer;
  Shared& shared;
  const int64_t first_group;
  const int lane, row;  // of this thread
  int64_t n = 0;        // the sample of the tile
  int p = 0, q = 0;     // the first output of the tile

  __device__ DepthwiseTile(Shared& shared, int64_t first_group)
      : layer(shared.layer),
        shared(shared),
        first_group(first_group),
        lane(static_cast<int>(threadIdx.x) % kLanes),
        row(static_cast<int>(threadIdx.x) / kLanes) {}

  // Where a part begins in its map, and the size of the map.
  struct Place {
    int top, left, height, width;
  };
  // The map of the inputs ends where the last window does. What is below or to the right is taken as zero, because the
  // outputs behind the last one, which are zero, are multiplied with it.
  __device__ __forceinline__ Place input_place() const {
    const int top = kStride * p - static_cast<int>(layer.padding[0]);
    const int left = kStride * q - static_cast<int>(layer.padding[1]);
    return {top, left, read_size(0, layer.P, layer.H), read_size(1, layer.Q, layer.W)};
  }
  __device__ __forceinline__ int read_size(int d, int64_t outputs, int64_t inputs) const {
    const int64_t end = kStride * (outputs - 1) + kSide - layer.padding[d];
    return static_cast<int>(kStride > 1 && end < inputs ? end : inputs);
  }
  __device__ __forceinline__ Place output_place() const {
    return {p - kReach, q - kReach, static_cast<int>(layer.P), static_cast<int>(layer.Q)};
  }

  __device__ __forceinline__ void load_weights() {
    for (int index = static_cast<int>(threadIdx.x); index < kTaps * kLanes; index += kBlockThreads) {
      const int tap = index / kLanes;
      T feedback = 0, combined = 0;
      if (first_group + lane < layer.G) {
        const int64_t at = (first_group + lane) * kTaps + tap;
        const auto rule = make_rule<T>(layer);
        visit_float_dtype(layer.dtype, [&](auto scalar) {
          using Scalar = decltype(scalar);
          feedback = to_acc(__ldg(static_cast<const Scalar*>(layer.feedback) + at));
          combined = rule.combined(feedback, to_acc(__ldg(static_cast<const Scalar*>(layer.weight) + at)));
        });
      }
      shared.feedback[tap][lane] = feedback;
      shared.combined[tap][lane] = combined;
    }
  }

  // visit(element, offset, inside) for the first kPartRows x kPartColumns positions of a part. `offset` is that of the
  // element in the map, if it is inside. A thread iterates over the columns of a row in channels_last, and over the
  // lanes otherwise, so that adjacent threads visit adjacent elements of the map.
  template <int kPartRows, int kPartColumns, typename Part, typename Visitor>
  __device__ __forceinline__ void for_each_element(Part& part, const FeatureMap& map, int64_t sample,
                                                   const Place& place, const Visitor& visit) const {
    const bool by_lane = map.channel != 1;
    const int lanes = static_cast<int>(layer.G - first_group < kLanes ? layer.G - first_group : kLanes);
    const int count = by_lane ? kLanes : kPartColumns, others = by_lane ? kPartColumns : kLanes;
    const int first = by_lane ? 0 : place.left, other_first = by_lane ? place.left : 0;
    const int size = by_lane ? lanes : place.width, other_size = by_lane ? place.width : lanes;
    const int64_t step = by_lane ? map.channel : map.column, other_step = by_lane ? map.column : map.channel;
    const int64_t start = sample * map.sample + first_group * map.channel + place.left * map.column;
    for (int i = row; i < kPartRows; i += kRows) {
      for (int other = lane; other < others; other += kLanes) {
        const bool inside = is_inside(place.top + i, place.height) && is_inside(other_first + other, other_size);
        const int inside_size = inside ? size : 0;
        int64_t offset = start + (place.top + i) * map.row + other * other_step;
        int at = by_lane ? part.index(i, other, 0) : part.index(i, 0, other);
#pragma unroll kLoadsAtOnce
        for (int k = 0; k < count; ++k) {
          visit(part.value[at], offset, is_inside(first + k, inside_size));
          offset += step;
          at += by_lane ? 1 : Part::kPosition;
        }
      }
    }
  }

  template <typename Part>
  __device__ __forceinline__ void load(Part& part, const FeatureMap& map, const Place& place) {
    visit_float_dtype(layer.dtype, [&](auto scalar) {
      const auto* data = static_cast<const decltype(scalar)*>(map.data);
      for_each_element<Part::kRows, Part::kColumns>(part, map, n, place, [&](T& x, int64_t offset, bool inside) {
        x = inside ? to_acc(__ldg(data + offset)) : T(0);
      });
    });
  }

  template <typename Part>
  __device__ __forceinline__ void subtract_mean(Part& part, const FeatureMap& mean, const Place& place) {
    const T* data = static_cast<const T*>(mean.data);
    for_each_element<Part::kRows, Part::kColumns>(part, mean, 0, place, [&](T& x, int64_t offset, bool inside) {
      if (inside) x -= __ldg(data + offset);
    });
  }

  // Writes the inputs of the tile to a map.
  __device__ __forceinline__ void store(const FeatureMap& map) {
    Place place = input_place();
    place.height = static_cast<int>(layer.H);
    place.width = static_cast<int>(layer.W);
    visit_float_dtype(layer.dtype, [&](auto scalar) {
      auto* data = static_cast<decltype(scalar)*>(map.data);
      for_each_element<kStride * kRows, kStride * kColumns>(shared.input, map, n, place,
                                                            [&](T& x, int64_t offset, bool inside) {
                                                              decltype(scalar) rounded;
                                                              from_acc(x, rounded);
                                                              if (inside) __stwb(data + offset, rounded);
                                                            });
    });
  }

  // Replaces the outputs of the tile by conv(input, combined).
  __device__ __forceinline__ void fprop() {
    T total[kColumns] = {};
#pragma unroll kRowsAtOnce
    for (int r = 0; r < kSide; ++r) {
      T x[kSpan];
#pragma unroll
      for (int j = 0; j < kSpan; ++j) x[j] = shared.input.at(kStride * row + r, j, lane);
#pragma unroll
      for (int s = 0; s < kSide; ++s) {
        const T weight = shared.combined[r * kSide + s][lane];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) total[c] += weight * x[kStride * c + s];
      }
    }
    const int columns = p + row < layer.P ? static_cast<int>(layer.Q) - q : 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      shared.output.at(kReach + row, kReach + c, lane) = c < columns ? total[c] : T(0);
    }
  }

  // Replaces the inputs of the tile by result(convT(output, feedback), input).
  template <typename Result>
  __device__ __forceinline__ void dgrad(const Result& result) {
    const Place place = input_place();
#pragma unroll 1
    for (int i = 0; i < kStride; ++i) {
      T total[kStride * kColumns] = {};
#pragma unroll kRowsAtOnce
      for (int k = 0; k <= kReach; ++k) {
        const int r = kStride * k + i;
        if (r >= kSide) break;
        T y[kColumns + kReach];
#pragma unroll
        for (int j = 0; j < kColumns + kReach; ++j) y[j] = shared.output.at(kReach + row - k, j, lane);
#pragma unroll
        for (int s = 0; s < kSide; ++s) {
          const T weight = shared.feedback[r * kSide + s][lane];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) total[kStride * c + s % kStride] += weight * y[kReach + c - s / kStride];
        }
      }
      const int width = is_inside(place.top + kStride * row + i, place.height) ? place.width : 0;
#pragma unroll
      for (int j = 0; j < kStride * kColumns; ++j) {
        T& input = shared.input.at(kStride * row + i, j, lane);
        input = is_inside(place.left + j, width) ? result(total[j], input) : T(0);
      }
    }
  }

  // Adds input * output to the sums of this thread: for each output of the tile and the inputs under its taps, or, if
  // kOfInputs, for each input of the tile and the outputs that its taps are connected to.
  template <bool kOfInputs>
  __device__ __forceinline__ void wgrad(T (&sums)[kSums]) {
    const int first_row = kByKernelRow ? 0 : row, end = kByKernelRow ? kRows : row + 1;
    for (int i = first_row; i < end; ++i) {
#pragma unroll
      for (int k = 0; k < kTapRows; ++k) {
        const int r = kByKernelRow ? row * kTapRows + k : k;
        if (r >= kSide) break;
        T x[kSpan], y[kColumns + kReach];
#pragma unroll
        for (int j = 0; j < kSpan; ++j) x[j] = shared.input.at(kStride * i + (kOfInputs ? r % kStride : r), j, lane);
#pragma unroll
        for (int j = 0; j < kColumns + kReach; ++j) {
          y[j] = shared.output.at(kReach + i - (kOfInputs ? r / kStride : 0), j, lane);
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
#pragma unroll
          for (int s = 0; s < kSide; ++s) {
            const int in = kOfInputs ? s % kStride : s, out = kOfInputs ? s / kStride : 0;
            sums[k * kSide + s] += x[kStride * c + in] * y[kReach + c - out];
          }
        }
      }
    }
  }

  // Adds one tile to the sums: of grad_weight, of the data terms of the rule, of the bias.
  __device__ __forceinline__ void add_tile(T (&of_weight)[kSums], T (&of_data)[kSums], T& of_bias) {
    __syncthreads();  // until all threads have finished the last tile
    load(shared.output, layer.grad_output, output_place());
    __syncthreads();
    if (layer.grad_input.data) {
      dgrad([](T total, T) { return total; });
      __syncthreads();
      store(layer.grad_input);
      __syncthreads();
    }
    load(shared.input, layer.input, input_place());
    __syncthreads();
    wgrad<false>(of_weight);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) of_bias += shared.output.at(kReach + row, kReach + c, lane);
    const auto rule = make_rule<T>(layer);
    if (n >= layer.samples || !rule.reads_data()) return;

    __syncthreads();
    if (layer.mean.data) subtract_mean(shared.input, layer.mean, input_place());
    if (rule.has_combined()) {
      __syncthreads();
      fprop();
      __syncthreads();
      wgrad<false>(of_data);
    }
    if (rule.null == 0) return;
    __syncthreads();
    load(shared.output, layer.response, output_place());
    __syncthreads();
    if (layer.response_mean.data) {
      subtract_mean(shared.output, layer.response_mean, output_place());
      __syncthreads();
    }
    dgrad([&](T total, T input) { return rule.null * total - rule.amp_of_null() * input; });
    __syncthreads();
    wgrad<true>(of_data);
  }

  // write(index, total) for kCount values of a group that are added over the rows of threads.
  template <int kCount, typename Write>
  __device__ __forceinline__ void add_rows(const T* values, const Write& write) {
    static_assert(kCount * kBlockThreads * sizeof(T) <= sizeof(shared.input));
    T* of_thread = shared.input.value;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) of_thread[i * kBlockThreads + row * kLanes + lane] = values[i];
    __syncthreads();
    for (int i = row; i < kCount; i += kRows) {
      T total = 0;
      for (int k = 0; k < kRows; ++k) total += of_thread[i * kBlockThreads + k * kLanes + lane];
      write(i, total);
    }
  }

  // Writes the sums of the block to `to` [groups, taps].
  __device__ __forceinline__ void write_sums(const T (&sums)[kSums], double* to) {
    const int64_t group = first_group + lane;
#pragma unroll
    for (int k = 0; k < kTapRows; ++k) {
      const int r = kByKernelRow ? row * kTapRows + k : k;
      const auto write = [&](int s, T total) {
        if (group < layer.G && r < kSide) to[group * kTaps + r * kSide + s] = total;
      };
      if constexpr (kByKernelRow) {
#pragma unroll
        for (int s = 0; s < kSide; ++s) write(s, sums[k * kSide + s]);
      } else {
        add_rows<kSide>(sums + k * kSide, write);
      }
    }
  }
};

// Chunks of the tiles of all samples. They cover all outputs and all inputs: some inputs may be below or to the right
// of every window.
template <typename Tile>
DepthwiseGrid tile_grid(const DepthwiseLayer& layer) {
  const auto tiles = [&](int d, int64_t outputs, int64_t inputs, int64_t size) {
    return (std::max(outputs, (inputs - 1 + layer.padding[d]) / Tile::kStride + 1) + size - 1) / size;
  };
  const int64_t down = tiles(0, layer.P, layer.H, Tile::kRows), right = tiles(1, layer.Q, layer.W, Tile::kColumns);
  DepthwiseGrid grid = depthwise_grid(layer, Tile::kBlockThreads, Tile::kBlocks, Tile::kLanes, layer.N * down * right);
  grid.tiles_down = down;
  grid.tiles_right = right;
  return grid;
}

// `partial` receives the sums of each chunk.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kBlockThreads, Tile::kBlocks)
    depthwise_tile_kernel(const __grid_constant__ DepthwiseLayer layer, DepthwiseGrid grid, double* partial) {
  using T = typename Tile::T;
  __shared__ typename Tile::Shared shared;
  const int64_t chunk = blockIdx.x / grid.group_blocks;
  if (threadIdx.x == 0) shared.layer = layer;
  __syncthreads();
  Tile tile(shared, blockIdx.x % grid.group_blocks * Tile::kLanes);
  tile.load_weights();
  T of_weight[Tile::kSums] = {}, of_data[Tile::kSums] = {}, of_bias = 0;
  const int64_t tiles = grid.tiles_down * grid.tiles_right, count = layer.N * tiles;
  for (int64_t index = chunk * count / grid.chunks; index < (chunk + 1) * count / grid.chunks; ++index) {
    tile.n = index / tiles;
    tile.p = static_cast<int>(index % tiles / grid.tiles_right) * Tile::kRows;
    tile.q = static_cast<int>(index % tiles % grid.tiles_right) * Tile::kColumns;
    tile.add_tile(of_weight, of_data, of_bias);
  }
  double* sums = partial + chunk * sums_of(layer);
  tile.write_sums(of_weight, sums);
  tile.write_sums(of_data, sums + weights_of(layer));
  const int64_t group = tile.first_group + tile.lane;
  tile.template add_rows<1>(&of_bias, [&](int, T total) {
    if (group < layer.G) sums[2 * weights_of(layer) + group] = total;
  });
}

}  // namespace pyfeedback::cuda
