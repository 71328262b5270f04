// Iterators over the elements of several operands. In an unnamed namespace, see scalar.h.
#pragma once

#include <cstdint>

#include "../layout.h"

// Tells the compiler that the iterations of the next loop are independent: the operands of a row are either the same or
// do not overlap. __restrict would rule out that they are the same.
#if defined(__clang__)
#define PYFEEDBACK_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define PYFEEDBACK_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace pyfeedback::cpu {
namespace {

// Visits the elements of a layout in row-major order.
template <int kOperands>
class StridedIterator {
 public:
  StridedIterator(const Layout<kOperands>& layout, int64_t element) : layout_(layout) {
    for (int64_t d = layout.dims - 1; d >= 0; --d) {
      index_[d] = element % layout.size[d];
      element /= layout.size[d];
      for (int k = 0; k < kOperands; ++k) offset_[k] += index_[d] * layout.stride[k][d];
    }
  }

  int64_t offset(int operand) const { return offset_[operand]; }

  void next() {
    for (int64_t d = layout_.dims - 1; d >= 0; --d) {
      const bool carry = ++index_[d] == layout_.size[d];
      const int64_t steps = carry ? 1 - layout_.size[d] : 1;
      for (int k = 0; k < kOperands; ++k) offset_[k] += steps * layout_.stride[k][d];
      if (!carry) return;
      index_[d] = 0;
    }
  }

 private:
  const Layout<kOperands>& layout_;
  int64_t index_[kMaxDims] = {};
  int64_t offset_[kOperands] = {};
};

// Element i of every operand is at offset i.
struct ContiguousIterator {
  int64_t element;
  int64_t offset(int) const { return element; }
  void next() { ++element; }
};

}  // namespace
}  // namespace pyfeedback::cpu
