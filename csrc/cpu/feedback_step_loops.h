// The loops of native_feedback_step_ over one stretch of one tensor. In an unnamed namespace, see scalar.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../feedback_step.h"
#include "../philox.h"
#include "scalar.h"
#include "walk.h"

namespace pyfeedback::cpu {
namespace {

// Every operand at the same place, one read of each and one write of feedback and momentum. T is float or double.
template <typename T, bool kWeight, bool kGrad, bool kMomentum>
void step_straight(const StepTensor& tensor, const FeedbackStep<T>& step, int64_t begin, int64_t end) {
  T* feedback = static_cast<T*>(tensor.feedback);
  const T* weight = static_cast<const T*>(tensor.weight);
  const T* grad = static_cast<const T*>(tensor.grad);
  T* momentum = static_cast<T*>(tensor.momentum);
  const FeedbackStep<T> local = step;
  PYFEEDBACK_TURNS_ARE_APART
  for (int64_t i = begin; i < end; ++i) {
    const T old = feedback[i];
    T direction = local.gradient(old, kWeight ? weight[i] : T(0), kGrad ? grad[i] : T(0));
    if constexpr (kMomentum) direction = local.direction(direction, momentum[i]);
    feedback[i] = old - local.lr * direction;
  }
}

template <typename T>
void step_dense(const StepTensor& tensor, const FeedbackStep<T>& step, int64_t begin, int64_t end) {
  constexpr decltype(&step_straight<T, false, false, false>) kLoops[] = {
      step_straight<T, false, false, false>, step_straight<T, false, false, true>, step_straight<T, false, true, false>,
      step_straight<T, false, true, true>,   step_straight<T, true, false, false>, step_straight<T, true, false, true>,
      step_straight<T, true, true, false>,   step_straight<T, true, true, true>,
  };
  kLoops[(tensor.has_weight ? 4 : 0) | (tensor.has_grad ? 2 : 0) | (tensor.has_momentum ? 1 : 0)](tensor, step, begin,
                                                                                                  end);
}

// 16-bit tensors pass through float rows that stay in the first-level cache.
template <typename Scalar>
void step_rows(const StepTensor& tensor, const FeedbackStep<float>& step, int64_t begin, int64_t end) {
  constexpr int64_t kRow = 512;
  float feedback[kRow], weight[kRow], grad[kRow], momentum[kRow];
  StepTensor row = tensor;
  row.feedback = feedback;
  if (tensor.has_weight) row.weight = weight;
  if (tensor.has_grad) row.grad = grad;
  if (tensor.has_momentum) row.momentum = momentum;
  for (int64_t i = begin; i < end; i += kRow) {
    const int64_t count = std::min(kRow, end - i);
    widen_row(static_cast<const Scalar*>(tensor.feedback) + i, feedback, count);
    if (tensor.has_weight) widen_row(static_cast<const Scalar*>(tensor.weight) + i, weight, count);
    if (tensor.has_grad) widen_row(static_cast<const Scalar*>(tensor.grad) + i, grad, count);
    if (tensor.has_momentum) widen_row(static_cast<const Scalar*>(tensor.momentum) + i, momentum, count);
    step_dense<float>(row, step, 0, count);
    narrow_row(feedback, static_cast<Scalar*>(tensor.feedback) + i, count);
    if (tensor.has_momentum) narrow_row(momentum, static_cast<Scalar*>(tensor.momentum) + i, count);
  }
}

// With noise, with operands in unlike layouts, or both: element by element in row-major order.
template <typename Scalar, typename Offsets>
void step_each(const StepTensor& tensor, const StepOptions& options, const FeedbackStep<Wide<Scalar>>& step, Offsets at,
               int64_t begin, int64_t end) {
  using T = Wide<Scalar>;
  const uint64_t seed = options.current_seed();
  Normals normal = {};
  for (int64_t i = begin; i < end; ++i, at.next()) {
    Scalar& feedback = static_cast<Scalar*>(tensor.feedback)[at.offset(0)];
    const T old = widen(feedback);
    const T weight = tensor.has_weight ? widen(static_cast<const Scalar*>(tensor.weight)[at.offset(1)]) : T(0);
    const T grad = tensor.has_grad ? widen(static_cast<const Scalar*>(tensor.grad)[at.offset(2)]) : T(0);
    T gradient = step.gradient(old, weight, grad);
    if (options.noise != 0) {
      if (i == begin || i % 4 == 0) normal = normals(seed, tensor.index, static_cast<uint64_t>(i) / 4);
      gradient += step.noise * normal.value[i % 4];
    }
    T direction = gradient;
    if (tensor.has_momentum) {
      Scalar& stored = static_cast<Scalar*>(tensor.momentum)[at.offset(3)];
      T buffer = widen(stored);
      direction = step.direction(gradient, buffer);
      narrow(buffer, stored);
    }
    narrow(old - step.lr * direction, feedback);
  }
}

void step(const StepTensor& tensor, const StepLayout* layout, const StepOptions& options, int64_t begin, int64_t end) {
  visit_dtype(tensor.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto coefficients = make_step<Wide<Scalar>>(tensor, options);
    if (layout) {
      step_each<Scalar>(tensor, options, coefficients, Walk(*layout, begin), begin, end);
    } else if (options.noise != 0) {
      step_each<Scalar>(tensor, options, coefficients, Straight{begin}, begin, end);
    } else if constexpr (std::is_same_v<Scalar, Wide<Scalar>>) {
      step_dense<Scalar>(tensor, coefficients, begin, end);
    } else {
      step_rows<Scalar>(tensor, coefficients, begin, end);
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

template <typename Scalar>
bool any_nonfinite_each(const StepTensor& tensor, Walk<kStepOperands> at, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i, at.next()) {
    if (tensor.has_weight && nonfinite(static_cast<const Scalar*>(tensor.weight)[at.offset(1)])) return true;
    if (tensor.has_grad && nonfinite(static_cast<const Scalar*>(tensor.grad)[at.offset(2)])) return true;
  }
  return false;
}

bool any_nonfinite(const StepTensor& tensor, const StepLayout* layout, int64_t begin, int64_t end) {
  return visit_dtype(tensor.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    if (layout) return any_nonfinite_each<Scalar>(tensor, Walk(*layout, begin), begin, end);
    return (tensor.has_weight && any_nonfinite_dense<Scalar>(tensor.weight, begin, end)) ||
           (tensor.has_grad && any_nonfinite_dense<Scalar>(tensor.grad, begin, end));
  });
}

}  // namespace
}  // namespace pyfeedback::cpu
