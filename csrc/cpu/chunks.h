// Splits the rows of a plan into chunks and runs them on several threads.
#pragma once

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "backend.h"

namespace pyfeedback::cpu {

// Elements of a row that stay in the first-level cache while the other rows of its group read them.
constexpr int64_t kBlock = 1024;

// Runs visit(row, layout, begin, end) over all rows. Threads get equal numbers of elements, not of tensors. A row and
// those after it that are with_previous form a group. A group is visited in blocks, all rows of a block after each
// other, so that what the rows share is read from memory once.
template <typename Row, typename Visitor>
void for_each_chunk(const Plan<Row>& plan, const Visitor& visit) {
  std::vector<size_t> heads;  // the first row of each group, and the number of rows
  std::vector<int64_t> ends;  // of each group, counted in elements of all rows
  int64_t total = 0;
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    total += plan.rows[i].numel;
    if (!plan.rows[i].with_previous) {
      heads.push_back(i);
      ends.push_back(total);
    } else {
      ends.back() = total;
    }
  }
  heads.push_back(plan.rows.size());
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t group = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
    for (; begin < end; ++group) {
      const Row* head = &plan.rows[heads[group]];
      const int64_t rows = static_cast<int64_t>(heads[group + 1] - heads[group]);
      const int64_t first = ends[group] - rows * head->numel;
      // The two threads on either side of a split round it to the same element.
      const int64_t last = (std::min(end, ends[group]) - first) / rows;
      const int64_t block = rows == 1 ? last : kBlock;
      for (int64_t at = (begin - first) / rows; at < last; at += block) {
        for (const Row* row = head; row != head + rows; ++row) {
          visit(*row, plan.layout(*row), at, std::min(at + block, last));
        }
      }
      begin = ends[group];
    }
  });
}

}  // namespace pyfeedback::cpu
