// The kernels of extension_center and extension_add_centered_ over one chunk of positions. In an unnamed namespace, see
// scalar.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../center.h"
#include "kernels.h"
#include "scalar.h"

namespace pyfeedback::cpu {
namespace {

// Samples are summed in groups of this size and the groups are then added: the rounding error grows with the size and
// the number of groups, not with the number of samples.
constexpr int64_t kGroup = 16;

// A row in the acc type: converted into `scratch`, or the row itself if it is in the acc type already.
template <typename Scalar>
const AccType<Scalar>* acc_row(const Scalar* row, AccType<Scalar>* scratch, int64_t count) {
  if constexpr (kIsAccType<Scalar>) {
    return row;
  } else {
    to_acc(row, scratch, count);
    return scratch;
  }
}

// The mean over the samples of each position.
template <typename Scalar>
void mean_of_chunk(const Scalar* input, AccType<Scalar>* mean, const CenterOperands& operands, int64_t width) {
  using T = AccType<Scalar>;
  T sum[kMaxCenterChunk], scratch[kMaxCenterChunk];
  std::fill_n(mean, width, T(0));
  for (int64_t group = 0; group < operands.samples; group += kGroup) {
    std::fill_n(sum, width, T(0));
    const int64_t last = std::min(group + kGroup, operands.samples);
    for (int64_t n = group; n < last; ++n) {
      const T* row = acc_row(input + n * operands.stride, scratch, width);
      for (int64_t p = 0; p < width; ++p) sum[p] += row[p];
    }
    for (int64_t p = 0; p < width; ++p) mean[p] += sum[p];
  }
  for (int64_t p = 0; p < width; ++p) mean[p] /= static_cast<T>(operands.samples);
}

// output = update(output, input - mean), where `output` is read if kReads.
template <bool kReads, typename Scalar, typename Update>
void update_chunk(const CenterOperands& operands, int64_t begin, int64_t end, const Update& update) {
  using T = AccType<Scalar>;
  const int64_t width = end - begin;
  const Scalar* input = static_cast<const Scalar*>(operands.input) + begin;
  T mean[kMaxCenterChunk], scratch[kMaxCenterChunk], values[kMaxCenterChunk];
  mean_of_chunk(input, mean, operands, width);
  for (int64_t n = 0; n < operands.samples; ++n) {
    const T* row = acc_row(input + n * operands.stride, scratch, width);
    Scalar* output = static_cast<Scalar*>(operands.output) + begin + n * operands.positions;
    if constexpr (kIsAccType<Scalar>) {
      T* __restrict result = output;
      for (int64_t p = 0; p < width; ++p) result[p] = update(result[p], row[p] - mean[p]);
    } else {
      if (kReads) to_acc(output, values, width);
      for (int64_t p = 0; p < width; ++p) values[p] = update(values[p], row[p] - mean[p]);
      from_acc(values, output, width);
    }
  }
}

void center(const CenterOperands& operands, int64_t begin, int64_t end) {
  visit_dtype(operands.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    update_chunk<false, Scalar>(operands, begin, end, [](auto, auto centered) { return centered; });
  });
}

void add_centered(const CenterOperands& operands, double beta, double alpha, int64_t begin, int64_t end) {
  visit_dtype(operands.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto b = static_cast<AccType<Scalar>>(beta), a = static_cast<AccType<Scalar>>(alpha);
    update_chunk<true, Scalar>(operands, begin, end, [=](auto old, auto centered) { return b * old + a * centered; });
  });
}

}  // namespace
}  // namespace pyfeedback::cpu
