// The loops of native_adamw_step_ over one stretch of one tensor. In an unnamed namespace, see scalar.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../adamw_step.h"
#include "scalar.h"
#include "walk.h"

namespace pyfeedback::cpu {
namespace {

// Every operand at the same place, one read of each and one write of what is stepped. T is float or double.
template <typename T, bool kHasWeight, bool kHasGrad>
void adamw_straight(const AdamWTensor& tensor, const AdamWStep<T>& step, int64_t begin, int64_t end) {
  T* param = static_cast<T*>(tensor.operand[kParam]);
  const T* weight = static_cast<const T*>(tensor.operand[kWeight]);
  const T* grad = static_cast<const T*>(tensor.operand[kGrad]);
  T* mean = static_cast<T*>(tensor.operand[kMean]);
  T* square = static_cast<T*>(tensor.operand[kSquare]);
  const AdamWStep<T> local = step;
  PYFEEDBACK_TURNS_ARE_APART
  for (int64_t i = begin; i < end; ++i) {
    const T gradient = local.gradient(param[i], kHasWeight ? weight[i] : T(0), kHasGrad ? grad[i] : T(0));
    param[i] = local.next(param[i], gradient, mean[i], square[i]);
  }
}

template <typename T>
void adamw_dense(const AdamWTensor& tensor, const AdamWStep<T>& step, int64_t begin, int64_t end) {
  constexpr decltype(&adamw_straight<T, false, false>) kLoops[] = {
      adamw_straight<T, false, false>, adamw_straight<T, false, true>, adamw_straight<T, true, false>,
      adamw_straight<T, true, true>};
  kLoops[(tensor.has_weight ? 2 : 0) | (tensor.has_grad ? 1 : 0)](tensor, step, begin, end);
}

// 16-bit tensors pass through float rows that stay in the first-level cache.
template <typename Scalar>
void adamw_rows(const AdamWTensor& tensor, const AdamWStep<float>& step, int64_t begin, int64_t end) {
  constexpr int64_t kRow = 512;
  float values[kAdamWOperands][kRow];
  AdamWTensor row = tensor;
  for (int k = 0; k < kAdamWOperands; ++k) {
    if (tensor.has(k)) row.operand[k] = values[k];
  }
  for (int64_t i = begin; i < end; i += kRow) {
    const int64_t count = std::min(kRow, end - i);
    for (int k = 0; k < kAdamWOperands; ++k) {
      if (tensor.has(k)) widen_row(static_cast<const Scalar*>(tensor.operand[k]) + i, values[k], count);
    }
    adamw_dense<float>(row, step, 0, count);
    for (int k : {kParam, kMean, kSquare}) {
      narrow_row(values[k], static_cast<Scalar*>(tensor.operand[k]) + i, count);
    }
  }
}

// With operands in unlike layouts: element by element in row-major order.
template <typename Scalar>
void adamw_each(const AdamWTensor& tensor, const AdamWStep<Wide<Scalar>>& step, Walk<kAdamWOperands> at, int64_t begin,
                int64_t end) {
  for (int64_t i = begin; i < end; ++i, at.next()) {
    Wide<Scalar> value[kAdamWOperands] = {};
    for (int k = 0; k < kAdamWOperands; ++k) {
      if (tensor.has(k)) value[k] = widen(static_cast<const Scalar*>(tensor.operand[k])[at.offset(k)]);
    }
    const auto gradient = step.gradient(value[kParam], value[kWeight], value[kGrad]);
    value[kParam] = step.next(value[kParam], gradient, value[kMean], value[kSquare]);
    for (int k : {kParam, kMean, kSquare}) narrow(value[k], static_cast<Scalar*>(tensor.operand[k])[at.offset(k)]);
  }
}

void adamw_step(const AdamWTensor& tensor, const AdamWLayout* layout, const AdamWOptions& options, int64_t begin,
                int64_t end) {
  visit_dtype(tensor.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto step = make_step<Wide<Scalar>>(tensor, options);
    if (layout) {
      adamw_each<Scalar>(tensor, step, Walk(*layout, begin), begin, end);
    } else if constexpr (std::is_same_v<Scalar, Wide<Scalar>>) {
      adamw_dense<Scalar>(tensor, step, begin, end);
    } else {
      adamw_rows<Scalar>(tensor, step, begin, end);
    }
  });
}

}  // namespace
}  // namespace pyfeedback::cpu
