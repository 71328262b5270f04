// The loops of native_alignment_products over one stretch of one pair. In an unnamed namespace, see scalar.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../alignment.h"
#include "scalar.h"
#include "walk.h"

namespace pyfeedback::cpu {
namespace {

// Vectors of the compiler's own: left to itself it keeps these sums in memory.
constexpr int kLanes = 4;
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));

// Two partial sums of each product, so that an addition need not wait for the one before it.
struct Partial {
  Products<Lanes> half[2] = {};

  void add(double b, double w) { half[0].add(Lanes{b}, Lanes{w}); }

  void store(double* sums) const {
    Products<Lanes> total = half[0];
    total.add(half[1]);
    const Lanes lanes[kProducts] = {total.feedback, total.weight, total.both};
    for (int k = 0; k < kProducts; ++k) sums[k] = (lanes[k][0] + lanes[k][1]) + (lanes[k][2] + lanes[k][3]);
  }
};

// T is float or double.
template <typename T>
void add_straight(Partial& products, const T* feedback, const T* weight, int64_t count) {
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T))));
  Partial local = products;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    for (int half = 0; half < 2; ++half) {
      Narrow b_read, w_read;
      std::memcpy(&b_read, feedback + i + half * kLanes, sizeof(Narrow));
      std::memcpy(&w_read, weight + i + half * kLanes, sizeof(Narrow));
      const Lanes b = __builtin_convertvector(b_read, Lanes), w = __builtin_convertvector(w_read, Lanes);
      local.half[half].add(b, w);
    }
  }
  for (; i < count; ++i) local.add(feedback[i], weight[i]);
  products = local;
}

template <typename Scalar>
void add_dense(Partial& products, const Scalar* feedback, const Scalar* weight, int64_t count) {
  if constexpr (std::is_same_v<Scalar, Wide<Scalar>>) {
    add_straight(products, feedback, weight, count);
  } else {
    constexpr int64_t kRow = 512;
    float wide_feedback[kRow], wide_weight[kRow];
    for (int64_t i = 0; i < count; i += kRow) {
      const int64_t row = std::min(kRow, count - i);
      widen_row(feedback + i, wide_feedback, row);
      widen_row(weight + i, wide_weight, row);
      add_straight(products, wide_feedback, wide_weight, row);
    }
  }
}

void alignment_products(const AlignmentPair& pair, const PairLayout* layout, int64_t begin, int64_t end, double* sums) {
  Partial products;
  visit_dtype(pair.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const Scalar* feedback = static_cast<const Scalar*>(pair.feedback);
    const Scalar* weight = static_cast<const Scalar*>(pair.weight);
    if (layout == nullptr) {
      add_dense(products, feedback + begin, weight + begin, end - begin);
      return;
    }
    Walk at(*layout, begin);
    for (int64_t i = begin; i < end; ++i, at.next()) {
      products.add(widen(feedback[at.offset(0)]), widen(weight[at.offset(1)]));
    }
  });
  products.store(sums);
}

}  // namespace
}  // namespace pyfeedback::cpu
