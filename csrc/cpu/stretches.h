// How the work on many tensors is cut among threads.
#pragma once

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../tensors.h"
#include "ops.h"

namespace pyfeedback::cpu {

// Elements of each operand that stay in the first-level cache from one row to the next of its group.
constexpr int64_t kBlock = 1024;

// Runs visit(row, layout, begin, end) over all rows, cut by element count and not by tensor. Rows that go with the one
// before them are a group, of which each block is visited row after row: what they share is read from memory once.
template <typename Row, int kOperands, typename Visitor>
void for_each_stretch(const Plan<Row, kOperands>& plan, const Visitor& visit) {
  std::vector<size_t> heads;  // of groups, and where the last one ends
  std::vector<int64_t> ends;  // of groups, in elements of all their rows
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
      // The threads on both sides of a cut round it alike.
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
