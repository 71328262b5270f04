// The loop of native_center over one stretch of positions. In an unnamed namespace, see scalar.h.
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

template <typename Scalar>
void center_stretch(const Scalar* input, Scalar* output, const SampleBlocks& blocks, int64_t width) {
  using T = Wide<Scalar>;
  T mean[kMaxStretch] = {}, sum[kMaxStretch], scratch[kMaxStretch];
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

}  // namespace
}  // namespace pyfeedback::cpu
