// How the CPU loops go from element to element. In an unnamed namespace, see scalar.h.
#pragma once

#include <cstdint>

#include "../layout.h"

// Before a loop of which each turn reads and writes elements of its own: operands of a row are apart or the same, and
// __restrict would rule out the second.
#if defined(__clang__)
#define PYFEEDBACK_TURNS_ARE_APART _Pragma("clang loop vectorize(assume_safety)")
#else
#define PYFEEDBACK_TURNS_ARE_APART _Pragma("GCC ivdep")
#endif

namespace pyfeedback::cpu {
namespace {

// Walks elements of a layout in row-major order and keeps the offset of each operand.
template <int kOperands>
class Walk {
 public:
  Walk(const Layout<kOperands>& layout, int64_t element) : layout_(layout) {
    for (int64_t d = layout.dims - 1; d >= 0; --d) {
      position_[d] = element % layout.size[d];
      element /= layout.size[d];
      for (int k = 0; k < kOperands; ++k) offset_[k] += position_[d] * layout.stride[k][d];
    }
  }

  int64_t offset(int operand) const { return offset_[operand]; }

  void next() {
    for (int64_t d = layout_.dims - 1; d >= 0; --d) {
      const bool carry = ++position_[d] == layout_.size[d];
      const int64_t steps = carry ? 1 - layout_.size[d] : 1;
      for (int k = 0; k < kOperands; ++k) offset_[k] += steps * layout_.stride[k][d];
      if (!carry) return;
      position_[d] = 0;
    }
  }

 private:
  const Layout<kOperands>& layout_;
  int64_t position_[kMaxDims] = {};
  int64_t offset_[kOperands] = {};
};

// Every operand has element i at i.
struct Straight {
  int64_t at;
  int64_t offset(int) const { return at; }
  void next() { ++at; }
};

}  // namespace
}  // namespace pyfeedback::cpu
