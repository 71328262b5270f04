// The kernel of extension_alignment_products: a block adds up a part of one pair, and the last block all parts.
#include "../alignment.h"
#include "pack.cuh"
#include "reduce.cuh"
#include "table.cuh"

namespace pyfeedback::cuda {

namespace {

using Sums = Products<double>;
using StridedPair = Strided<AlignmentPair>;

template <typename Scalar>
__device__ __forceinline__ void add_block(Sums& sums, const AlignmentPair& pair, int64_t block) {
  constexpr int kWidth = kPack<Scalar>;
  const bool aligned = is_aligned(pair.feedback, pair.weight);
  for_each_pack<kWidth>(pair.numel, block, [&](int64_t first, int count) {
    const Pack<Scalar> feedback = load<Scalar>(pair.feedback, first, count, aligned && count == kWidth);
    const Pack<Scalar> weight = load<Scalar>(pair.weight, first, count, aligned && count == kWidth);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums.add(to_acc(feedback.value[j]), to_acc(weight.value[j]));
  });
}

template <typename Scalar>
__device__ __forceinline__ void add_block(Sums& sums, const StridedPair& pair, int64_t block) {
  for_each_element(pair.numel, block, [&](int64_t i) {
    int64_t offset[2];
    find_offsets(pair.strides, i, offset);
    sums.add(to_acc(read<Scalar>(pair.feedback, offset[0])), to_acc(read<Scalar>(pair.weight, offset[1])));
  });
}

// The first thread receives the sums of all threads.
__device__ __forceinline__ void reduce_block(Sums& sums) {
  __shared__ Sums of_warp[kThreads / kWarp];
  add_lanes(sums.feedback);
  add_lanes(sums.weight);
  add_lanes(sums.both);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) sums.add(of_warp[warp]);
}

// Reads what another block wrote in this launch, bypassing the first-level cache, which may hold an older line.
__device__ __forceinline__ Sums read_fresh(const Sums* sums) {
  return {__ldcg(&sums->feedback), __ldcg(&sums->weight), __ldcg(&sums->both)};
}

// `partial` receives the sums of each block, and `arrived` is zero for each pair. The last block of a pair to arrive
// adds up the sums of all its blocks.
template <typename Table>
__global__ void __launch_bounds__(kThreads)
    products_kernel(const __grid_constant__ Table table, Sums* partial, unsigned* arrived, Sums* products) {
  const int index = table.find(blockIdx.x);
  const auto& pair = table.row[index];
  const int first = table.first_block[index], end = table.first_block[index + 1];
  Sums sums{};
  visit_dtype(pair.dtype,
              [&](auto scalar) { add_block<decltype(scalar)>(sums, pair, static_cast<int64_t>(blockIdx.x) - first); });
  reduce_block(sums);
  if (threadIdx.x == 0) partial[blockIdx.x] = sums;
  if (!is_last(arrived + pair.index, end - first)) return;
  sums = {};
  for (int block = first + static_cast<int>(threadIdx.x); block < end; block += kThreads) {
    sums.add(read_fresh(partial + block));
  }
  reduce_block(sums);
  if (threadIdx.x == 0) products[pair.index] = sums;
}

}  // namespace

int64_t alignment_blocks(const std::vector<AlignmentPair>& pairs) {
  int64_t blocks = 0;
  for (const AlignmentPair& pair : pairs) blocks += blocks_of(pair.numel);
  return blocks;
}

cudaError_t launch_alignment(const std::vector<AlignmentPair>& pairs,
                             const std::vector<RowLayout<AlignmentPair>>& layouts, double* partial, unsigned* arrived,
                             double* products, cudaStream_t stream) {
  return for_each_table(pairs, layouts, [&](const auto& table) {
    return launch(products_kernel<std::decay_t<decltype(table)>>, table.blocks(), stream, table,
                  reinterpret_cast<Sums*>(partial), arrived, reinterpret_cast<Sums*>(products));
  });
}

}  // namespace pyfeedback::cuda
