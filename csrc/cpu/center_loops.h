// The loops of native_center and native_add_centered_ over one stretch of positions. In an unnamed namespace, see
// scalar.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../arguments.h"
#include "center.h"
#include "scalar.h"

namespace pyfeedback::cpu {
namespace {

// Samples added up before the sum is passed on: rounding grows with the group and with the number of groups, no longer
// with the number of samples.
constexpr int64_t kGroup = 16;

// A row in the wide type: converted into `scratch`, or where it lies if it is wide already.
template <typename Scalar>
const Wide<Scalar>* wide_row(const Scalar* row, Wide<Scalar>* scratch, int64_t count) {
  if constexpr (std::is_same_v<Scalar, Wide<Scalar>>) {
    return row;
  } else {
    widen_row(row, scratch, count);
    return scratch;
  }
}

// The mean over the samples of each position.
template <typename Scalar>
void mean_of_stretch(const Scalar* input, Wide<Scalar>* mean, const SampleBlocks& blocks, int64_t width) {
  using T = Wide<Scalar>;
  T sum[kMaxStretch], scratch[kMaxStretch];
  std::fill_n(mean, width, T(0));
  for (int64_t group = 0; group < blocks.samples; group += kGroup) {
    std::fill_n(sum, width, T(0));
    const int64_t last = std::min(group + kGroup, blocks.samples);
    for (int64_t n = group; n < last; ++n) {
      const T* row = wide_row(input + n * blocks.stride, scratch, width);
      for (int64_t p = 0; p < width; ++p) sum[p] += row[p];
    }
    for (int64_t p = 0; p < width; ++p) mean[p] += sum[p];
  }
  for (int64_t p = 0; p < width; ++p) mean[p] /= static_cast<T>(blocks.samples);
}

template <typename Scalar>
void center_stretch(const Scalar* input, Scalar* output, const SampleBlocks& blocks, int64_t width) {
  using T = Wide<Scalar>;
  T mean[kMaxStretch], scratch[kMaxStretch];
  mean_of_stretch(input, mean, blocks, width);
  for (int64_t n = 0; n < blocks.samples; ++n) {
    const T* row = wide_row(input + n * blocks.stride, scratch, width);
    Scalar* __restrict centered = output + n * blocks.positions;
    if constexpr (std::is_same_v<Scalar, T>) {
      for (int64_t p = 0; p < width; ++p) centered[p] = row[p] - mean[p];
    } else {
      for (int64_t p = 0; p < width; ++p) scratch[p] = row[p] - mean[p];
      narrow_row(scratch, centered, width);
    }
  }
}

void center(const void* input, void* output, const SampleBlocks& blocks, int64_t begin, int64_t end) {
  visit_dtype(blocks.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    center_stretch(static_cast<const Scalar*>(input) + begin, static_cast<Scalar*>(output) + begin, blocks,
                   end - begin);
  });
}

// self = beta * self + alpha * (input - mean)
template <typename Scalar>
void add_centered_stretch(Scalar* self, const Scalar* input, const SampleBlocks& blocks, int64_t width,
                          Wide<Scalar> beta, Wide<Scalar> alpha) {
  using T = Wide<Scalar>;
  T mean[kMaxStretch], scratch[kMaxStretch], sum[kMaxStretch];
  mean_of_stretch(input, mean, blocks, width);
  for (int64_t n = 0; n < blocks.samples; ++n) {
    const T* row = wide_row(input + n * blocks.stride, scratch, width);
    Scalar* total = self + n * blocks.positions;
    if constexpr (std::is_same_v<Scalar, T>) {
      T* __restrict wide = total;
      for (int64_t p = 0; p < width; ++p) wide[p] = beta * wide[p] + alpha * (row[p] - mean[p]);
    } else {
      widen_row(total, sum, width);
      for (int64_t p = 0; p < width; ++p) sum[p] = beta * sum[p] + alpha * (row[p] - mean[p]);
      narrow_row(sum, total, width);
    }
  }
}

void add_centered(void* self, const void* input, const SampleBlocks& blocks, int64_t begin, int64_t end, double beta,
                  double alpha) {
  visit_dtype(blocks.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    using T = Wide<Scalar>;
    add_centered_stretch(static_cast<Scalar*>(self) + begin, static_cast<const Scalar*>(input) + begin, blocks,
                         end - begin, static_cast<T>(beta), static_cast<T>(alpha));
  });
}

}  // namespace
}  // namespace pyfeedback::cpu
