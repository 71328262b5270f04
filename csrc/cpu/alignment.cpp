#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "kernels.h"
#include "ops.h"

namespace pyfeedback::cpu {

torch::stable::Tensor alignment_products(StableListHandle feedback, StableListHandle weight) {
  const TensorList feedbacks(feedback), weights(weight);
  const AlignmentPlan plan = plan_alignment(feedbacks, weights);
  torch::stable::Tensor products = zero_products(feedbacks);

  // Pieces of fixed size, added up in their order: the same sum on any number of threads.
  struct Piece {
    const AlignmentPair* pair;
    int64_t begin;
    double sums[kProducts];
  };
  std::vector<Piece> pieces;
  for (const AlignmentPair& pair : plan.rows) {
    for (int64_t begin = 0; begin < pair.numel; begin += kGrain) pieces.push_back({&pair, begin, {}});
  }
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Piece& piece = pieces[i];
      const int64_t end = std::min(piece.begin + kGrain, piece.pair->numel);
      kernel.alignment_products(*piece.pair, plan.layout(*piece.pair), piece.begin, end, piece.sums);
    }
  });
  double* sums = static_cast<double*>(products.mutable_data_ptr());
  for (const Piece& piece : pieces) {
    for (int k = 0; k < kProducts; ++k) sums[piece.pair->index * kProducts + k] += piece.sums[k];
  }
  return products;
}

}  // namespace pyfeedback::cpu
