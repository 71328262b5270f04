// The operands of native_alignment_products.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "layout.h"

namespace pyfeedback {

constexpr int kProducts = 3;  // <feedback, feedback>, <weight, weight>, <feedback, weight>

struct AlignmentPair {
  const void* feedback;
  const void* weight;
  int64_t numel;
  int32_t index;   // row of the output
  int32_t layout;  // place in the list of layouts, or -1: element i of both is at i
  Dtype dtype;
};

using PairLayout = Layout<2>;

}  // namespace pyfeedback
