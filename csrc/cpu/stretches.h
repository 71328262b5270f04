// How the work on many tensors is cut among threads.
#pragma once

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../tensors.h"
#include "ops.h"

namespace pyfeedback::cpu {

// Runs visit(row, layout, begin, end) over all rows, cut by element count and not by tensor.
template <typename Row, int kOperands, typename Visitor>
void for_each_stretch(const Plan<Row, kOperands>& plan, const Visitor& visit) {
  std::vector<int64_t> ends(plan.rows.size());
  int64_t total = 0;
  for (size_t i = 0; i < ends.size(); ++i) ends[i] = total += plan.rows[i].numel;
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
    for (; begin < end; ++i) {
      const Row& row = plan.rows[i];
      const int64_t first = ends[i] - row.numel, last = std::min(end, ends[i]);
      visit(row, plan.layout(row), begin - first, last - first);
      begin = last;
    }
  });
}

}  // namespace pyfeedback::cpu
