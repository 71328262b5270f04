// The arithmetic of native_alignment_products, shared by CPU and CUDA, and the pairs it runs over.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"
#include "layout.h"

namespace pyfeedback {

constexpr int kProducts = 3;  // <feedback, feedback>, <weight, weight>, <feedback, weight>

// Sums of products of one pair; Wide is double, or a vector of them.
template <typename Wide>
struct Products {
  Wide feedback, weight, both;

  PYFEEDBACK_HOST_DEVICE void add(const Wide& b, const Wide& w) {
    feedback += b * b;
    weight += w * w;
    both += b * w;
  }

  PYFEEDBACK_HOST_DEVICE void add(const Products& other) {
    feedback += other.feedback;
    weight += other.weight;
    both += other.both;
  }
};

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
