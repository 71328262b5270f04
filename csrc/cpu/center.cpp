// Divides extension_center and extension_add_centered_ among threads; the kernels are in center_kernels.h.
#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "backend.h"
#include "kernels.h"

namespace pyfeedback::cpu {

namespace {

// A chunk of positions is read twice. The second pass reads it from a second-level cache, because a chunk of all
// samples has this size. A chunk smaller than the minimum wastes the cache line that is fetched with each sample.
constexpr int64_t kChunkBytes = 512 * 1024;
constexpr int64_t kMinChunk = 64;

// Runs visit(begin, end) over the positions of a sample.
template <typename Visitor>
void for_each_chunk(const CenterOperands& operands, const Visitor& visit) {
  const int64_t fitting = kChunkBytes / (operands.samples * element_size(operands.dtype));
  const int64_t width = std::clamp(fitting / kMinChunk * kMinChunk, kMinChunk, kMaxCenterChunk);
  const int64_t chunks = (operands.positions + width - 1) / width;
  const int64_t grain = std::max<int64_t>(1, kGrain / (width * operands.samples));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) visit(k * width, std::min((k + 1) * width, operands.positions));
  });
}

}  // namespace

void Backend::center(const CenterOperands& operands) const {
  for_each_chunk(operands, [&](int64_t begin, int64_t end) { kernels().center(operands, begin, end); });
}

void Backend::add_centered(const CenterOperands& operands, double beta, double alpha) const {
  for_each_chunk(operands,
                 [&](int64_t begin, int64_t end) { kernels().add_centered(operands, beta, alpha, begin, end); });
}

}  // namespace pyfeedback::cpu
