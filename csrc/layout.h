// The strides of several operands of one shape, for operands whose elements are not at equal offsets.
#pragma once

#include <cstdint>

namespace pyfeedback {

constexpr int kMaxDims = 8;

template <int kOperands>
struct Layout {
  int64_t dims;
  int64_t size[kMaxDims];
  int64_t stride[kOperands][kMaxDims];  // in elements
};

template <typename Row>
using RowLayout = Layout<Row::kOperands>;

}  // namespace pyfeedback
