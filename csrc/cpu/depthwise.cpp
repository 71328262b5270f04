// Divides the depthwise backward among threads, and gives memory to that of a small layer without groups; the kernels
// are in depthwise_kernels.h and dense_kernels.h.
#include <algorithm>
#include <memory>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "backend.h"
#include "kernels.h"

namespace pyfeedback::cpu {

namespace {

// About this many units of work have separate sums, which are added in a fixed order: the result does not depend on the
// number of threads.
constexpr int64_t kUnits = 64;
// A block has as many groups as a vector has lanes. In channels_last, up to kMostBlocks adjacent blocks share the cache
// lines of a position. One thread processes them together if their rows fit kCacheBytes of a second-level cache.
constexpr int64_t kMostBlocks = 8, kCacheBytes = 256 * 1024;

}  // namespace

void Backend::depthwise_backward(const DepthwiseLayer& layer) const {
  const Kernels& kernel = kernels();
  const int64_t lanes = layer.dtype == Dtype::kFloat64 ? 4 : 8;  // kLanesOf of depthwise_rows.h
  const int64_t size = (2 * layer.J * layer.I * layer.R * layer.S + layer.J) * lanes;
  const int64_t blocks = (layer.G + lanes - 1) / lanes;
  const int64_t fitting = kCacheBytes / kernel.depthwise_bytes(layer, 1);
  const int64_t most = std::clamp<int64_t>(fitting, 1, std::min(blocks, kMostBlocks));
  const int64_t bytes = kernel.depthwise_bytes(layer, most);
  const int64_t strips = (blocks + most - 1) / most;
  const int64_t chunk = (layer.N * strips + kUnits - 1) / kUnits;
  const int64_t chunks = (layer.N + chunk - 1) / chunk;
  std::vector<double> sums(chunks * blocks * size);
  torch::stable::parallel_for(0, chunks * strips, 1, [&](int64_t begin, int64_t end) {
    constexpr size_t kAlignment = 64;
    size_t space = bytes + kAlignment;
    const std::unique_ptr<char[]> memory(new char[space]);
    void* aligned = memory.get();
    std::align(kAlignment, bytes, aligned, space);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit % strips * most, first = unit / strips * chunk;
      const DepthwiseWork work{block, std::min(most, blocks - block), first, std::min(first + chunk, layer.N)};
      kernel.depthwise(layer, work, aligned, &sums[(unit / strips * blocks + block) * size]);
    }
  });
  torch::stable::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      kernel.depthwise_finish(layer, block, &sums[block * size], chunks, blocks * size);
    }
  });
}

void Backend::dense_backward(const DepthwiseLayer& layer, bool center) const {
  const std::unique_ptr<char[]> memory(new char[kernels().dense_bytes(layer)]);
  kernels().dense(layer, center, memory.get());
}

}  // namespace pyfeedback::cpu
