// The kernels of extension_feedback_step_ and extension_adamw_step_ over one chunk of one row. In an unnamed namespace,
// see scalar.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../philox.h"
#include "../step.h"
#include "scalar.h"
#include "strided_iterator.h"

namespace pyfeedback::cpu {
namespace {

// Element i of every operand is at offset i. T is float or double. Not inlined: within step_16bit,
// the loop that GCC 12 compiles is 8 % slower for float16.
template <typename T, bool kHasWeight, bool kHasGrad, bool kHasStates, typename Row, typename Step>
__attribute__((noinline)) void step_contiguous(const Row& row, const Step& step, int64_t begin, int64_t end) {
  constexpr int kStates = Row::kOperands - kState;
  T* stepped = static_cast<T*>(row.operand[kStepped]);
  const T* weight = static_cast<const T*>(row.operand[kWeight]);
  const T* grad = static_cast<const T*>(row.operand[kGrad]);
  T* states[kStates];
  for (int k = 0; k < kStates; ++k) states[k] = static_cast<T*>(row.operand[kState + k]);
  const Step local = step;
  PYFEEDBACK_INDEPENDENT_ITERATIONS
  for (int64_t i = begin; i < end; ++i) {
    const T gradient = local.gradient(stepped[i], kHasWeight ? weight[i] : T(0), kHasGrad ? grad[i] : T(0));
    T state[kStates];
    for (int k = 0; kHasStates && k < kStates; ++k) state[k] = states[k][i];
    stepped[i] = local.next(stepped[i], gradient, kHasStates ? state : nullptr);
    for (int k = 0; kHasStates && k < kStates; ++k) states[k][i] = state[k];
  }
}

// visit(std::bool_constant<flag>{})
template <typename Visitor>
void visit_flag(bool flag, const Visitor& visit) {
  flag ? visit(std::true_type{}) : visit(std::false_type{});
}

// A loop for each combination of operands.
template <typename T, typename Row, typename Step>
void step_dense(const Row& row, const Step& step, int64_t begin, int64_t end) {
  visit_flag(row.has(kWeight), [&](auto weight) {
    visit_flag(row.has(kGrad), [&](auto grad) {
      visit_flag(row.has(kState), [&](auto state) {
        constexpr bool kHasStates = decltype(state)::value || !Step::kHasOptionalState;
        step_contiguous<T, decltype(weight)::value, decltype(grad)::value, kHasStates>(row, step, begin, end);
      });
    });
  });
}

// 16-bit operands are converted in pieces that stay in the first-level cache.
template <typename Scalar, typename Row, typename Step>
void step_16bit(const Row& row, const Step& step, int64_t begin, int64_t end) {
  constexpr int64_t kPiece = 512;
  float values[Row::kOperands][kPiece];
  Row piece = row;
  for (int k = 0; k < Row::kOperands; ++k) {
    if (row.has(k)) piece.operand[k] = values[k];
  }
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t count = std::min(kPiece, end - i);
    for (int k = 0; k < Row::kOperands; ++k) {
      if (row.has(k)) to_acc(static_cast<const Scalar*>(row.operand[k]) + i, values[k], count);
    }
    step_dense<float>(piece, step, 0, count);
    from_acc(values[kStepped], static_cast<Scalar*>(row.operand[kStepped]) + i, count);
    for (int k = kState; k < Row::kOperands; ++k) {
      if (row.has(k)) from_acc(values[k], static_cast<Scalar*>(row.operand[k]) + i, count);
    }
  }
}

// Element by element in row-major order, for noise or operands with different strides.
template <typename Scalar, typename Row, typename Step, typename Options, typename Iterator>
void step_each(const Row& row, const Step& step, const Options& options, Iterator at, int64_t begin, int64_t end) {
  using T = AccType<Scalar>;
  constexpr int kStates = Row::kOperands - kState;
  const uint64_t seed = options.current_seed();
  Normals draws = {};
  const auto element = [&](int k) -> Scalar& { return static_cast<Scalar*>(row.operand[k])[at.offset(k)]; };
  for (int64_t i = begin; i < end; ++i, at.next()) {
    const T old = to_acc(element(kStepped));
    const T weight = row.has(kWeight) ? to_acc(element(kWeight)) : T(0);
    const T grad = row.has(kGrad) ? to_acc(element(kGrad)) : T(0);
    T gradient = step.gradient(old, weight, grad);
    if (options.noise != 0) {
      if (i == begin || i % 4 == 0) draws = normals(seed, row.index, static_cast<uint64_t>(i) / 4);
      gradient += static_cast<T>(options.noise) * draws.value[i % 4];
    }
    const bool has_states = row.has(kState);
    T state[kStates];
    for (int k = 0; has_states && k < kStates; ++k) state[k] = to_acc(element(kState + k));
    from_acc(step.next(old, gradient, has_states ? state : nullptr), element(kStepped));
    for (int k = 0; has_states && k < kStates; ++k) from_acc(state[k], element(kState + k));
  }
}

template <typename Row, typename Options>
void step(const Row& row, const RowLayout<Row>* layout, const Options& options, int64_t begin, int64_t end) {
  visit_dtype(row.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto step = make_step<AccType<Scalar>>(row, options);
    if (layout) {
      step_each<Scalar>(row, step, options, StridedIterator(*layout, begin), begin, end);
    } else if (options.noise != 0) {
      step_each<Scalar>(row, step, options, ContiguousIterator{begin}, begin, end);
    } else if constexpr (kIsAccType<Scalar>) {
      step_dense<Scalar>(row, step, begin, end);
    } else {
      step_16bit<Scalar>(row, step, begin, end);
    }
  });
}

template <typename Scalar>
bool any_nonfinite_dense(const void* data, int64_t begin, int64_t end) {
  const Scalar* values = static_cast<const Scalar*>(data);
  decltype(nonfinite(Scalar{})) found = 0;
  for (int64_t i = begin; i < end; ++i) found |= nonfinite(values[i]);
  return found != 0;
}

bool any_nonfinite(const FeedbackRow& row, const RowLayout<FeedbackRow>* layout, int64_t begin, int64_t end) {
  return visit_dtype(row.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    for (int k : {kWeight, kGrad}) {
      if (!row.has(k)) continue;
      if (layout == nullptr) {
        if (any_nonfinite_dense<Scalar>(row.operand[k], begin, end)) return true;
        continue;
      }
      StridedIterator at(*layout, begin);
      for (int64_t i = begin; i < end; ++i, at.next()) {
        if (nonfinite(static_cast<const Scalar*>(row.operand[k])[at.offset(k)])) return true;
      }
    }
    return false;
  });
}

}  // namespace
}  // namespace pyfeedback::cpu
