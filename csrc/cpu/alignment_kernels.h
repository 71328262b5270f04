// The kernels of extension_alignment_products over one chunk of one pair. In an unnamed namespace, see scalar.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../alignment.h"
#include "scalar.h"
#include "strided_iterator.h"

namespace pyfeedback::cpu {
namespace {

// Explicit vectors, because the compiler would keep the sums of plain loops in memory.
constexpr int kLanes = 4;
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));

// Two partial sums of each product, so that consecutive additions are independent.
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
void add_contiguous(Partial& products, const T* feedback, const T* weight, int64_t count) {
  typedef T Values __attribute__((vector_size(kLanes * sizeof(T))));
  Partial local = products;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    for (int half = 0; half < 2; ++half) {
      Values b_values, w_values;
      std::memcpy(&b_values, feedback + i + half * kLanes, sizeof(Values));
      std::memcpy(&w_values, weight + i + half * kLanes, sizeof(Values));
      const Lanes b = __builtin_convertvector(b_values, Lanes), w = __builtin_convertvector(w_values, Lanes);
      local.half[half].add(b, w);
    }
  }
  for (; i < count; ++i) local.add(feedback[i], weight[i]);
  products = local;
}

template <typename Scalar>
void add_dense(Partial& products, const Scalar* feedback, const Scalar* weight, int64_t count) {
  if constexpr (kIsAccType<Scalar>) {
    add_contiguous(products, feedback, weight, count);
  } else {
    constexpr int64_t kPiece = 512;
    float feedback_values[kPiece], weight_values[kPiece];
    for (int64_t i = 0; i < count; i += kPiece) {
      const int64_t piece = std::min(kPiece, count - i);
      to_acc(feedback + i, feedback_values, piece);
      to_acc(weight + i, weight_values, piece);
      add_contiguous(products, feedback_values, weight_values, piece);
    }
  }
}

void alignment_products(const AlignmentPair& pair, const RowLayout<AlignmentPair>* layout, int64_t begin, int64_t end,
                        double* sums) {
  Partial products;
  visit_dtype(pair.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const Scalar* feedback = static_cast<const Scalar*>(pair.feedback);
    const Scalar* weight = static_cast<const Scalar*>(pair.weight);
    if (layout == nullptr) {
      add_dense(products, feedback + begin, weight + begin, end - begin);
      return;
    }
    StridedIterator at(*layout, begin);
    for (int64_t i = begin; i < end; ++i, at.next()) {
      products.add(to_acc(feedback[at.offset(0)]), to_acc(weight[at.offset(1)]));
    }
  });
  products.store(sums);
}

}  // namespace
}  // namespace pyfeedback::cpu
