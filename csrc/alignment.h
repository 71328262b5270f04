// extension_alignment_products: the pairs that its kernels read and the arithmetic, shared by CPU and CUDA.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"
#include "layout.h"

namespace pyfeedback {

constexpr int kProducts = 3;  // <feedback, feedback>, <weight, weight>, <feedback, weight>

// Sums of products of one pair. T is double, or a vector of doubles.
template <typename T>
struct Products {
  T feedback, weight, both;

  PYFEEDBACK_HOST_DEVICE void add(const T& b, const T& w) {
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
  static constexpr int kOperands = 2;

  const void* feedback;
  const void* weight;
  int64_t numel;
  int32_t index;   // row of the output
  int32_t layout;  // index into the layouts of the plan, or -1 if element i of both is at offset i
  Dtype dtype;
};

}  // namespace pyfeedback
