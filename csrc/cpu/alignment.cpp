// Divides extension_alignment_products among threads; the kernel is in alignment_kernels.h.
#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "backend.h"
#include "kernels.h"

namespace pyfeedback::cpu {

void Backend::alignment_products(const AlignmentPlan& plan, const Tensor& products) const {
  // Chunks have a fixed size and are added in order, so the sum does not depend on the number of threads.
  struct Chunk {
    const AlignmentPair* pair;
    int64_t begin;
    double sums[kProducts];
  };
  std::vector<Chunk> chunks;
  for (const AlignmentPair& pair : plan.rows) {
    for (int64_t begin = 0; begin < pair.numel; begin += kGrain) chunks.push_back({&pair, begin, {}});
  }
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Chunk& chunk = chunks[i];
      const int64_t end = std::min(chunk.begin + kGrain, chunk.pair->numel);
      kernel.alignment_products(*chunk.pair, plan.layout(*chunk.pair), chunk.begin, end, chunk.sums);
    }
  });
  double* sums = static_cast<double*>(products.mutable_data_ptr());
  for (const Chunk& chunk : chunks) {
    for (int k = 0; k < kProducts; ++k) sums[chunk.pair->index * kProducts + k] += chunk.sums[k];
  }
}

}  // namespace pyfeedback::cpu
