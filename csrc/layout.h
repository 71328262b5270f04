// Where the elements of several operands of one shape stand, if not all at the same place.
#pragma once

#include <cstdint>

namespace pyfeedback {

constexpr int kMaxDims = 8;

// Element strides of each operand over one shape.
template <int kOperands>
struct Layout {
  int64_t dims;
  int64_t size[kMaxDims];
  int64_t stride[kOperands][kMaxDims];
};

}  // namespace pyfeedback
