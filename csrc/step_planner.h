// Turns the operands of a multi-tensor step into rows for its kernels, and checks what keeps memory safe.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "sharing.h"
#include "tensors.h"

namespace pyfeedback {

// Adds rows whose operands are what is stepped, weight, grad, and the states of what is stepped.
template <typename Row, size_t kOperands>
class StepPlanner {
 public:
  using Views = std::array<View, kOperands>;

  StepPlanner(const char* names, size_t count) : names_(names) {
    plan_.rows.reserve(count);
    operands_.reserve(count);
    chain_.reserve(count);
    for (std::vector<Span>& spans : spans_) spans.reserve(count);
  }

  // The operands of the row that is added next, for the caller to fill in.
  Views& next() {
    current_ = 1 - current_;
    return views_[current_] = Views{};
  }

  // Adds a row of the operands of next(). `row_major` wants that order even of operands that share another one.
  void add(Row row, size_t index, bool row_major) {
    const Views &views = views_[current_], &before = views_[1 - current_];
    const View& stepped = views[0];
    const bool alike = check_alike(views, names_, index);
    if (stepped.shape.numel == 0) {
      current_ = 1 - current_;  // no row to go on from
      return;
    }
    STD_TORCH_CHECK(plan_.rows.empty() || stepped.device == device_, names_, " ", index,
                    " are not on the device of the first");
    device_ = stepped.device;
    row.numel = stepped.shape.numel;
    row.index = static_cast<uint32_t>(index);
    row.dtype = stepped.dtype;
    row.layout = -1;
    if (!alike || (row_major && !stepped.shape.contiguous)) place(row, views);
    row.with_previous = same_view(before[kWeight], stepped) || same_view(before[kWeight], views[kWeight]) ||
                        same_view(before[kGrad], views[kGrad]);
    const uint32_t here = static_cast<uint32_t>(plan_.rows.size());
    chain_.push_back(row.with_previous ? chain_.back() : here);
    std::array<AtenTensorHandle, kOperands> operands;
    for (size_t k = 0; k < kOperands; ++k) {
      operands[k] = views[k].tensor;
      if (operands[k]) spans_[k].push_back(span_of(views[k], here, k != kWeight && k != kGrad, k == 0));
    }
    plan_.rows.push_back(row);
    operands_.push_back(operands);
  }

  // What belongs to the row added last, or to no row.
  void add_written(const View& view) { spans_[0].push_back(span_of(view, kNoRow, true, false)); }
  void add_read(const View& view) { spans_[0].push_back(span_of(view, kNoRow, false, false)); }

  // Rows that share memory are all dense, and then in the order of what they share, or all row-major.
  Plan<Row, kOperands> finish() {
    for (size_t k = 1; k < kOperands; ++k) spans_[0].insert(spans_[0].end(), spans_[k].begin(), spans_[k].end());
    check_sharing(spans_[0], chain_);
    std::vector<Row>& rows = plan_.rows;
    for (size_t first = 0, last; first < rows.size(); first = last) {
      last = first + 1;
      while (last < rows.size() && rows[last].with_previous) ++last;
      const auto placed = [](const Row& row) { return row.layout >= 0; };
      if (std::none_of(rows.begin() + first, rows.begin() + last, placed)) continue;
      for (size_t i = first; i < last; ++i) {
        if (placed(rows[i])) continue;
        Views views;
        for (size_t k = 0; k < kOperands; ++k) {
          if (operands_[i][k]) views[k] = read_view(operands_[i][k], names_);
        }
        place(rows[i], views);
      }
    }
    return std::move(plan_);
  }

 private:
  static constexpr size_t kWeight = 1, kGrad = 2;

  static Span span_of(const View& view, uint32_t row, bool written, bool stepped) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(view.data);
    return {begin, begin + static_cast<uintptr_t>(view.bytes), view.tensor, row, written, stepped};
  }

  void place(Row& row, const Views& views) {
    for (size_t k = 0; k < kOperands; ++k) {
      STD_TORCH_CHECK(k == kWeight || k == kGrad || !views[k].tensor || !has_shared_places(views[k].shape), names_, " ",
                      row.index, " have one with several elements at one place; expected a place for each");
    }
    row.layout = static_cast<int32_t>(plan_.layouts.size());
    plan_.layouts.push_back(strided_layout(views, names_));
  }

  const char* names_;
  Device device_{};
  Plan<Row, kOperands> plan_;
  Views views_[2];  // of the row added last, and of the next one
  int current_ = 0;
  std::vector<std::array<AtenTensorHandle, kOperands>> operands_;  // of each row
  std::vector<uint32_t> chain_;  // the first row of those that each is stepped together with
  std::array<std::vector<Span>, kOperands> spans_;
};

}  // namespace pyfeedback
